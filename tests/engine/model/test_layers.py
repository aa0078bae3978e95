"""Position table, fp16 guard and packed linear maps."""

from __future__ import annotations

import pytest
import torch
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSinusoidalPositionalEmbedding

from engine.config import EngineConfig
from engine.model.layers import Linear, clamp_overflow, sinusoidal_positions
from engine.weights.loading import load_transformer
from tests.engine.model.test_transformer import decode_alone, encode, make_cache
from tests.engine.tiny import TINY_ODD, make_tiny_checkpoint


@pytest.mark.parametrize(("rows", "d_model", "pad"), [(5, 4, 1), (70, 27, 1), (1100, 64, 0)])
def test_positions_are_those_of_transformers(rows: int, d_model: int, pad: int) -> None:
    expected = NllbMoeSinusoidalPositionalEmbedding.get_embedding(rows, d_model, pad)
    assert torch.equal(sinusoidal_positions(rows, d_model, pad), expected)


def test_overflow_is_clamped_per_token_and_in_fp16_only() -> None:
    big = 65000.0
    x = torch.tensor([[torch.inf, big, 1.0], [-big, 2.0, 3.0], [-torch.inf, 0.0, -big]])
    limit = 65504.0 - 1000
    expected = torch.tensor([[limit, limit, 1.0], [-big, 2.0, 3.0], [-limit, 0.0, -limit]]).half()
    assert torch.equal(clamp_overflow(x.half()), expected)
    assert clamp_overflow(x) is x


@pytest.mark.parametrize("shape", [(64, 32), (53, 36), (1, 1), (130, 27)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packing_a_linear_map_changes_no_bit(shape: tuple[int, int], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16() if with_bias else None
    plain, packed = Linear(weight, bias), Linear(weight.clone(), bias)
    packed.pack()
    for rows in (1, 3, 17, 70):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "w8a16", "w4a16", "w4a16-g64"])
@pytest.mark.parametrize("overrides", [{}, TINY_ODD])
def test_half_and_quantized_models_stay_near_fp32(
    precision: str, overrides: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Loose by nature: it catches a wrong scale, layout or cast, not a rounding. Logit rms is about 2."""
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=6, **overrides)
    source, target = [5, 9, 33, 12, 50, 2], [2, 7, 21, 8, 40]
    logits = []
    for name in ("fp32", precision):
        transformer = load_transformer(checkpoint, EngineConfig(precision=name, max_source_tokens=16, max_target_tokens=16))
        cache = make_cache(transformer)
        encode(transformer, cache, [source], slots=[1])
        logits.append(decode_alone(transformer, cache, target, row=2, slot=1))
    error = (logits[1] - logits[0]).pow(2).mean().sqrt() / logits[0].pow(2).mean().sqrt()
    assert error < {"w4a16": 0.6, "w4a16-g64": 0.6}.get(precision, 0.12)
