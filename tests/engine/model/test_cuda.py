"""The plain path on a GPU against the slow twin on the CPU. Needs no transformers: weights are drawn here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.config import EngineConfig, ModelConfig
from engine.kv_cache import KVCache
from engine.model.reference import reference_logits
from engine.quantization.symmetric import quantize
from engine.weights.loading import load_transformer
from engine.weights.mapping import expected_specs, is_expert_matrix

pytestmark = pytest.mark.gpu

RAW = {
    "vocab_size": 301, "d_model": 96, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 160, "decoder_ffn_dim": 192, "encoder_sparse_step": 2,
    "decoder_sparse_step": 2, "num_experts": 9,
}  # fmt: skip
GAINS = {"shared": 0.6, "router": 2.0, "q_proj": 2.0, "k_proj": 2.0, "fc": 2.0}


def draw_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Weights spread like those of tests.engine.tiny, saved in the HF layout; returned by name."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, spec in expected_specs(ModelConfig.from_dict(RAW)).items():
        noise = torch.randn(spec.shape, generator=generator)
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        weights[name] = 1 + 0.2 * noise if "norm.weight" in name else gain * noise / spec.shape[-1] ** 0.5
        if name.endswith("bias"):
            weights[name] = 0.1 * noise
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(RAW))
    return weights


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("fp32", "float32", 2e-6), ("w4a16", "float32", 2e-6), ("w8a16-g64", "float32", 2e-6), ("bf16", None, 0.1),
     ("fp16", None, 0.02), ("w4a16", None, 0.1), ("w8a16", "float16", 0.02)],
)  # fmt: skip
def test_forced_decoding(precision: str, dtype: str | None, tolerance: float, tmp_path: Path) -> None:
    """Two sentences, five rows at different positions; error relative to the largest logit."""
    weights = draw_checkpoint(tmp_path)
    engine_config = EngineConfig(
        device="cuda",
        precision=precision,
        activation_dtype=dtype,
        max_source_tokens=32,
        max_target_tokens=32,  # type: ignore[arg-type]
    )
    transformer = load_transformer(tmp_path, engine_config)
    if engine_config.quant_scheme is not None:
        for name in filter(is_expert_matrix, list(weights)):
            weights[name] = quantize(weights[name], engine_config.quant_scheme).dequantize()
    cuda = torch.device("cuda")
    sources = [[5, 9, 33, 12, 50, 2], [7, 8, 2]]
    targets = [[2, 7, 21, 8, 40, 33, 12], [2, 9, 1, 11], [2, 100], [2, 200, 250], [2, 30, 31, 32, 33]]
    slots = torch.tensor([1, 0, 0, 1, 1], device=cuda)
    cache = KVCache.allocate(
        transformer.config, num_rows=6, max_target_tokens=9, num_source_slots=2, max_source_tokens=16,
        dtype=transformer.dtype, device=cuda,
    )  # fmt: skip
    offsets = torch.tensor([0, 6, 9], device=cuda)
    memory = transformer.encode(torch.tensor([token for source in sources for token in source], device=cuda), offsets)
    transformer.write_cross_kv(memory, offsets, torch.tensor([0, 1], device=cuda), cache)
    rows = torch.tensor([5, 0, 2, 3, 1], device=cuda)
    ancestry = rows[:, None].repeat(1, 9)
    for step in range(7):
        positions = [min(step, len(target) - 1) for target in targets]
        logits = transformer.decode(
            torch.tensor([target[p] for target, p in zip(targets, positions, strict=True)], device=cuda),
            torch.tensor(positions, device=cuda), rows, slots, ancestry, cache,
        ).cpu()  # fmt: skip
        for row, (target, position) in enumerate(zip(targets, positions, strict=True)):
            source = sources[int(slots[row])]
            expected = reference_logits(weights, transformer.config, source, target[: position + 1])[-1]
            assert (logits[row] - expected).abs().max() < tolerance * expected.abs().max()
