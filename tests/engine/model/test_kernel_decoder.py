"""Which launches a decoder layer of the kernel path makes: its router from what the map before has left, or on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.model.layers
import engine.quantization.cpu_experts
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.model import kernel_layers
from engine.model.kernel_decoder import EntryGroups, KernelDecoder
from engine.model.kernel_layers import KernelOptions
from engine.model.kernel_weights import KernelDense, KernelExperts
from engine.weights.loading import load_transformer
from kernels.beam_search import StepInputs
from kernels.row_products import RowProducts, chunk_products
from kernels.row_statistics import chunk_statistics
from tests.engine.tiny import make_tiny_checkpoint

ROWS = 6
SHAPE = {"d_model": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 16}
SHAPE |= {"decoder_layers": 2, "decoder_sparse_step": 1}
MakeDecoder = Callable[..., KernelDecoder]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("kernel_decoder"), seed=2, router_bias=True, **SHAPE)


@pytest.fixture
def make_decoder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDecoder:
    """A decoder in bf16 on the CPU, each time from the files: it takes the Transformer apart."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    for module in (engine.model.layers, engine.quantization.cpu_experts):
        monkeypatch.setattr(module, "can_pack", lambda dtype, device: False)

    def make(**options: bool) -> KernelDecoder:
        config = EngineConfig(precision="w4a16", activation_dtype="bfloat16", max_source_tokens=16, max_target_tokens=4)
        transformer = load_transformer(checkpoint, config)
        limits = {"num_rows": ROWS, "max_target_tokens": 4, "num_source_slots": 2, "max_source_tokens": 16}
        cache = KVCache.allocate(transformer.config, **limits, dtype=torch.bfloat16, device=torch.device("cpu"))
        cache.cross_kv.normal_(generator=torch.Generator().manual_seed(3))
        cache.source_lengths.fill_(7)
        return KernelDecoder(transformer, cache, max_entries=ROWS, options=KernelOptions(**options))

    return make


def first_step(decoder: KernelDecoder) -> Tensor:
    """Hidden states of a first step: five start tokens of two sentences, and an idle entry."""
    rows = torch.tensor([0, 1, 2, 3, 4, -1], dtype=torch.int32)
    tokens, none = torch.tensor([5, 9, 14, 30, 31, 0], dtype=torch.int32), torch.full((ROWS,), -1, dtype=torch.int32)
    inputs = StepInputs(tokens, torch.zeros_like(rows), rows, rows >= 0, none)
    unused = [0] * (ROWS - 2)
    slots, starts, counts = ([0, 1, *[-1] * (ROWS - 2)], [0, 2, *unused], [2, 3, *unused])
    groups = EntryGroups(*(torch.tensor(values, dtype=torch.int32) for values in (slots, starts, counts)))
    hidden = decoder.hidden(inputs, groups, torch.zeros((ROWS, 5), dtype=torch.int32))
    assert isinstance(hidden, Tensor)
    return hidden[:5].float()


def sparse_layers(decoder: KernelDecoder) -> list[KernelExperts]:
    return [layer.feed_forward for layer in decoder._layers if isinstance(layer.feed_forward, KernelExperts)]


def leave_products(monkeypatch: pytest.MonkeyPatch) -> list[RowProducts]:
    """From now on maps leave statistics and products of their rows where they are asked for some, as those of a Hopper GPU
    do. Returns the products that they have left."""
    made: list[RowProducts] = []
    plain = kernel_layers.small_linear

    def leaving(*operands: Any, **options: Any) -> Tensor:
        result, products, statistics = plain(*operands, **options), options["products"], options["statistics"]
        if products is not None:
            assert options["residual"] is not None
            statistics.chunks[: len(result)], statistics.valid = chunk_statistics(result), True
            products.parts = chunk_products(result, products.thirds)
            made.append(products)
        return result

    monkeypatch.setattr(kernel_layers, "small_linear", leaving)
    return made


@torch.inference_mode()
def test_each_sparse_layer_has_its_router_multiplied_before_its_norm(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, decoder = make_decoder(), make_decoder()
    want = first_step(plain)
    left = leave_products(monkeypatch)
    monkeypatch.setattr(kernel_layers, "route", None)  # nobody routes otherwise
    got = first_step(decoder)
    layers = sparse_layers(decoder)
    assert [id(products.thirds) for products in left] == [id(layer.folded and layer.folded.thirds) for layer in layers]
    counts = [layer.tokens_per_expert.tolist() for layer in layers]
    assert [sum(row) for row in counts] == [10, 10]
    for mine, others in zip(counts, (layer.tokens_per_expert.tolist() for layer in sparse_layers(plain)), strict=True):
        moved = sum(abs(a - b) for a, b in zip(mine, others, strict=True))
        assert moved <= 2, "more than one choice differs: the norm is rounded before the product here, and not there"
    assert (got - want).norm() < 0.1 * want.norm()


@torch.inference_mode()
def test_a_router_that_was_multiplied_chooses_by_the_products(make_decoder: MakeDecoder) -> None:
    """Those of rows that none of these are: whoever routed anew would choose otherwise."""
    decoder = make_decoder()
    kernels, layer = decoder._kernels, decoder._layers[0]
    feed_forward = layer.feed_forward
    assert isinstance(feed_forward, KernelExperts)
    products, statistics = kernels.products_for(feed_forward), kernels.statistics
    assert products is not None
    assert statistics is not None
    x = torch.randn((ROWS, 256), generator=torch.Generator().manual_seed(0)).bfloat16()
    statistics.chunks[:ROWS], statistics.valid = chunk_statistics(x), True
    products.parts = torch.zeros((4, ROWS, 16))
    products.parts[1, :, 3], products.parts[2, :, 7] = 200.0, 100.0
    active = torch.arange(ROWS) != 2
    pending = kernels.feed_forward(x, layer.ffn_norm, feed_forward, active, products)
    assert pending is not None
    assert pending.expert_ids.tolist() == [[3, 7] if is_active else [-1, -1] for is_active in active]
    assert feed_forward.tokens_per_expert.tolist() == [5 if expert in (3, 7) else 0 for expert in range(16)]


def test_products_are_asked_for_where_a_router_behind_a_norm_takes_them(make_decoder: MakeDecoder) -> None:
    decoder, fixed = make_decoder(), make_decoder(fixed_order=True)
    layer, dense = sparse_layers(decoder)[0], KernelDense(*(decoder._layers[0].self_out,) * 2)
    products = decoder._kernels.products_for(layer)
    assert products is not None
    assert layer.folded is not None
    assert products.thirds is layer.folded.thirds
    assert products.parts is None
    assert decoder._kernels.products_for(replace(layer, folded=None)) is None  # experts or features that no kernel serves
    assert decoder._kernels.products_for(dense) is None
    assert fixed._kernels.products_for(sparse_layers(fixed)[0]) is None


def test_lists_are_wanted_where_a_kernel_takes_them_and_bits_may_depend_on_beam_mates(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_decoder().lists_from is None  # on a CPU
    monkeypatch.setattr(
        "engine.model.kernel_decoder.lists_from", lambda heads, head_dim, dtype, device: 100 * heads + head_dim
    )
    assert make_decoder().lists_from == 464
    assert make_decoder(fixed_order=True).lists_from is None
