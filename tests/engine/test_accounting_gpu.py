"""What is planned for an engine on a GPU against what its objects hold, buffer by buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.accounting import _history_list_bytes, plan_memory
from engine.config import EngineConfig, ModelConfig, QuantScheme
from engine.device_runner import size_buckets
from engine.kv_cache import KVCache
from engine.model.allocation import allocate_transformer
from engine.model.kernel_decoder import KernelDecoder
from engine.model.kernel_layers import KernelOptions
from engine.model.kernel_weights import KernelDense, KernelExperts, kernel_feed_forward
from engine.model.layers import DenseFeedForward
from engine.search.device_search import DeviceSearch, StepShape
from kernels.route.constants import gate_constants
from kernels.route.tiles import GateTiles
from kernels.row_products import RowProducts
from tests.engine.test_accounting import NLLB_54B
from tests.engine.tiny import TINY_ODD, make_tiny_model


def test_the_routers_partial_sums_are_planned_at_their_largest() -> None:
    """The plan knows no tiles: it takes the most parts that the router's launcher takes, of the larger pass that routes."""
    with pytest.raises(ValueError, match="choose 1 to 16"):
        GateTiles(split=17)
    config = EngineConfig(precision="w4a16", device="cuda", encode_token_budget=4096)
    odd, even = replace(NLLB_54B, num_experts=100), replace(NLLB_54B, num_experts=128)
    constants = gate_constants(2048, 100, 2, GateTiles(split=16), torch.bfloat16, on_gpu=True)
    largest = torch.empty((16, 4096, constants["E_PAD"]), dtype=torch.float32, device="meta").nbytes
    one_layer = replace(odd, encoder_sparse_step=0, decoder_sparse_step=0)
    assert plan_memory(odd, config).workspace_bytes - plan_memory(one_layer, config).workspace_bytes == largest
    assert plan_memory(odd, config).workspace_bytes == plan_memory(even, config).workspace_bytes
    decoder_only = replace(even, encoder_sparse_step=0)
    entries = config.max_rows + config.max_source_slots
    assert plan_memory(decoder_only, config).workspace_bytes - plan_memory(one_layer, config).workspace_bytes == (
        largest * entries // 4096
    )


@pytest.mark.parametrize(("num_experts", "d_model"), [(16, 64), (32, 128), (16, 48), (8, 64)])
def test_folded_routers_are_planned_as_the_decoder_holds_them(num_experts: int, d_model: int) -> None:
    """In bf16, on a GPU; none where no kernel serves so many experts or features."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shape = {"d_model": d_model, "num_experts": num_experts, "decoder_layers": 4, **heads}
    config = ModelConfig.from_dict(make_tiny_model(seed=0, **{**TINY_ODD, **shape}).config.to_dict())
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    held = 0
    for layer in allocate_transformer(config, scheme=QuantScheme(4), max_tokens=8, **options).decoder_layers:
        if not isinstance(layer.feed_forward, DenseFeedForward):
            kernel = kernel_feed_forward(layer.feed_forward, fold=layer.feed_forward_norm)
            assert isinstance(kernel, KernelExperts)
            if kernel.folded is not None:
                held += sum(t.nbytes for t in (kernel.folded.thirds, kernel.folded.sums, kernel.folded.shift))
    assert (held > 0) == (num_experts >= 16 and d_model != 48)
    gpu = EngineConfig(device="cuda", precision="w4a16")
    assert plan_memory(config, gpu).rest_bytes - plan_memory(config, replace(gpu, device="cpu")).rest_bytes == held
    half = replace(gpu, activation_dtype="float16")
    assert plan_memory(config, half).rest_bytes == plan_memory(config, replace(half, device="cpu")).rest_bytes


def test_products_of_a_wide_decoder_are_planned_where_they_are_more_than_partial_sums() -> None:
    """A map leaves them by chunks of 64 features; here the decoder alone routes."""
    wide = replace(NLLB_54B, num_experts=64, encoder_sparse_step=0)
    dense = replace(wide, decoder_sparse_step=0)
    config = EngineConfig(precision="w4a16", device="cuda", max_rows=320, max_source_slots=80)
    products = RowProducts(torch.empty((3 * 64, 2048), dtype=torch.bfloat16, device="meta"))
    planned = plan_memory(wide, config).workspace_bytes - plan_memory(dense, config).workspace_bytes
    assert planned == products.allocate(400).nbytes


def test_history_lists_are_planned_as_the_search_holds_them() -> None:
    config = EngineConfig(precision="w4a16", device="cuda", max_rows=315, max_source_slots=80)
    buckets, held, planned = size_buckets(395), [], []
    for positions in (40, 201):
        options = {"num_slots": 80, "num_rows": 315, "start_token_id": 2, "eos_token_id": 2, "lists_from": 100}
        device = torch.device("cpu")
        search = DeviceSearch(**options, max_target_tokens=positions, entry_buckets=buckets, device=device)
        lists = search.history_lists(StepShape(buckets[-1], 8, ()))
        assert lists is not None
        assert _history_list_bytes(395, positions) == lists.num_bytes
        held.append(lists.num_bytes)
        planned.append(plan_memory(NLLB_54B, replace(config, max_target_tokens=positions)).workspace_bytes)
    assert planned[1] - planned[0] == held[1] - held[0] > 0


@pytest.mark.parametrize("tied", [True, False])
def test_int8_dense_is_planned_as_the_decoder_holds_it(tied: bool) -> None:
    """Bytes of the decoder's maps and of the two ends, with the option and without; what a folded norm leaves beside them is
    in neither plan. A vocabulary that needs no padding, which no plan counts."""
    shape = {"vocab_size": 128, "d_model": 48, "decoder_layers": 5, "tie_word_embeddings": tied}
    raw = make_tiny_model(seed=0, **{**TINY_ODD, **shape}).config.to_dict()
    config = ModelConfig.from_dict(raw)
    held, planned = [], []
    for int8 in (False, True):
        options = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
        transformer = allocate_transformer(config, scheme=QuantScheme(4), max_tokens=8, **options)
        for layer in transformer.decoder_layers:
            for norm in (layer.self_attention_norm, layer.cross_attention_norm, layer.feed_forward_norm):
                norm.weight.fill_(1.0)
                norm.bias.fill_(0.0)
            linears = [layer.self_attention.qkv, layer.cross_attention.query]
            if isinstance(layer.feed_forward, DenseFeedForward):
                linears.append(layer.feed_forward.fc1)
            for linear in linears:
                linear.weight.fill_(0.5)
                linear.bias.fill_(0.0)
        cache = KVCache.allocate(config, num_rows=1, max_target_tokens=1, num_source_slots=1, max_source_tokens=1, **options)
        decoder = KernelDecoder(transformer, cache, max_entries=2, options=KernelOptions(int8_dense=int8))
        total = sum(num_bytes(linear.weight) for layer in decoder._layers for linear in maps(layer))
        ends = (transformer.embedding, transformer.output_projection.weight)
        plain = {t.data_ptr(): t.nbytes for t in ends if t.device.type != "meta"}
        held.append(total + sum(plain.values()) + (num_bytes(decoder._head) if int8 else 0))
        planned.append(plan_memory(config, EngineConfig(device="cuda", int8_dense=int8)).rest_bytes)
    assert planned[1] - planned[0] == held[1] - held[0]


def maps(layer: Any) -> list[Any]:
    """The dense linear maps of a layer of the kernels' decoder."""
    feed_forward = layer.feed_forward
    dense = [feed_forward.fc1, feed_forward.fc2] if isinstance(feed_forward, KernelDense) else []
    return [layer.qkv, layer.self_out, layer.query, layer.cross_out, *dense]


def num_bytes(weight: Any) -> int:
    """Of a matrix as it is stored: floats, or codes and scales."""
    stored = getattr(weight, "weight", weight)
    return sum(t.nbytes for t in ((stored,) if isinstance(stored, torch.Tensor) else (stored.codes, stored.scales)))
