"""Closed forms against the published 54B configuration, against real state dicts, and against counted FLOPs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.accounting import (
    count_parameters,
    cross_kv_flops_per_token,
    decoder_flops_per_row,
    encoder_flops_per_token,
    expert_bytes,
    fitting_precisions,
    kv_bytes_per_row,
    kv_bytes_per_slot,
    matrix_bytes,
    model_bytes,
    num_sparse_layers,
    plan_memory,
)
from engine.config import PRECISIONS, EngineConfig, ModelConfig, QuantScheme
from engine.kv_cache import KVCache
from engine.model.allocation import allocate_transformer
from engine.weights.mapping import TensorPlace, map_places
from tests.engine.tiny import TINY_EVEN, TINY_ODD, make_tiny_model

NLLB_54B = ModelConfig(
    vocab_size=256206,
    d_model=2048,
    encoder_layers=24,
    decoder_layers=24,
    encoder_attention_heads=16,
    decoder_attention_heads=16,
    encoder_ffn_dim=8192,
    decoder_ffn_dim=8192,
    encoder_sparse_step=4,
    decoder_sparse_step=4,
    num_experts=128,
)


def test_parameters_of_the_54b() -> None:
    counts = count_parameters(NLLB_54B)
    assert counts.total == 54_500_569_088
    assert counts.experts == 51_555_336_192
    assert counts.expert_matrices == 51_539_607_552
    assert counts.routers == 3_145_728
    assert counts.embedding == 524_709_888
    assert counts.dense == 2_417_377_280
    assert counts.rest == 2_960_961_536
    assert num_sparse_layers(NLLB_54B, "encoder") == num_sparse_layers(NLLB_54B, "decoder") == 6


@pytest.mark.parametrize(
    ("precision", "experts_gb", "one_expert_mb"),
    [("fp32", 206.16, 134.2), ("bf16", 103.08, 67.11), ("fp16", 103.08, 67.11), ("w8a16", 51.57, 33.57),
     ("w4a16", 25.80, 16.80), ("w4a16-g128", 26.58, 17.30)],
)  # fmt: skip
def test_expert_bytes_of_the_54b(precision: str, experts_gb: float, one_expert_mb: float) -> None:
    one = matrix_bytes(8192, 2048, precision) + matrix_bytes(2048, 8192, precision)
    assert expert_bytes(NLLB_54B, precision) == 1536 * one
    assert expert_bytes(NLLB_54B, precision) / 1e9 == pytest.approx(experts_gb, abs=0.006)
    assert one / 1e6 == pytest.approx(one_expert_mb, abs=0.06)


@pytest.mark.parametrize(
    ("precision", "gb"), [("fp32", 218.0), ("bf16", 109.0), ("w8a16", 57.5), ("w4a16", 31.7), ("w4a16-g128", 32.5)]
)
def test_whole_54b_with_rest_in_its_dtype(precision: str, gb: float) -> None:
    assert model_bytes(NLLB_54B, precision) / 1e9 == pytest.approx(gb, abs=0.06)


def test_int4_per_channel_is_at_least_seven_and_a_half_times_smaller_than_fp32() -> None:
    assert expert_bytes(NLLB_54B, "fp32") / expert_bytes(NLLB_54B, "w4a16") > 7.9
    assert matrix_bytes(512, 256, "fp32") / matrix_bytes(512, 256, "w4a16") > 7.5


def test_odd_matrices_round_up() -> None:
    assert matrix_bytes(3, 65, "w4a16") == 3 * (33 + 2)
    assert matrix_bytes(3, 65, "w4a16-g64") == 3 * (33 + 2 * 2)
    assert matrix_bytes(3, 65, "w8a16-g64") == 3 * (65 + 2 * 2)


@pytest.mark.parametrize(
    "overrides",
    [
        TINY_EVEN,
        TINY_ODD,
        {"router_bias": True},
        {"tie_word_embeddings": False},
        {"encoder_sparse_step": 0, "decoder_sparse_step": 1},
    ],
)
def test_parameters_of_real_state_dicts(overrides: dict[str, int]) -> None:
    model = make_tiny_model(seed=0, **overrides)
    named = dict(model.named_parameters())  # tied parameters once
    counts = count_parameters(ModelConfig.from_dict(model.config.to_dict()))
    assert counts.total == sum(p.numel() for p in named.values())
    assert counts.expert_matrices == sum(p.numel() for n, p in named.items() if ".experts." in n and n.endswith("weight"))
    assert counts.expert_biases == sum(p.numel() for n, p in named.items() if ".experts." in n and n.endswith("bias"))
    assert counts.routers == sum(p.numel() for n, p in named.items() if ".router." in n)


def test_kv_bytes_are_the_caches_and_the_54bs() -> None:
    assert kv_bytes_per_row(NLLB_54B, 1, 2) == kv_bytes_per_slot(NLLB_54B, 1, 2) == 192 * 1024
    config = ModelConfig.from_dict(make_tiny_model(seed=0, **TINY_ODD).config.to_dict())
    cache = KVCache.allocate(
        config, num_rows=3, max_target_tokens=5, num_source_slots=2, max_source_tokens=32, dtype=torch.float16,
        device=torch.device("cpu"),
    )  # fmt: skip
    counted = 3 * kv_bytes_per_row(config, 5, 2) + 2 * kv_bytes_per_slot(config, 32, 2)
    assert cache.num_bytes == counted + 2 * 4  # and an int32 length per slot


def test_flops_against_a_counter_on_a_dense_model() -> None:
    """Without experts HF runs exactly the counted products, so torch's counter must agree to the last FLOP."""
    model = make_tiny_model(seed=0, **{**TINY_ODD, "encoder_sparse_step": 0, "decoder_sparse_step": 0})
    config = ModelConfig.from_dict(model.config.to_dict())
    source, target = torch.full((1, 7), 5), torch.full((1, 4), 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target)
    # HF scores all T x T pairs; a cached step t scores t of them, so count every row with T.
    expected = 7 * (encoder_flops_per_token(config, 7) + cross_kv_flops_per_token(config))
    expected += 4 * decoder_flops_per_row(config, source_tokens=7, target_tokens=4)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_a_sparse_layer_costs_its_experts_and_a_router(experts_per_token: int) -> None:
    raw = {**make_tiny_model(seed=0).config.to_dict(), "num_experts_per_tok": experts_per_token}
    dense, sparse = (ModelConfig.from_dict({**raw, "decoder_sparse_step": step}) for step in (0, 2))
    difference = decoder_flops_per_row(sparse, 5, 5) - decoder_flops_per_row(dense, 5, 5)
    assert difference == (experts_per_token - 1) * 4 * 32 * 64 + 2 * 32 * 4  # against one dense layer


def test_the_plan_counts_second_copies_on_the_cpu_only() -> None:
    cpu = plan_memory(NLLB_54B, EngineConfig(precision="w4a16"))
    gpu = plan_memory(NLLB_54B, EngineConfig(precision="w4a16", device="cuda"))
    assert cpu.layout_copies_bytes == cpu.experts_bytes // 2 + 2 * 256206 * 2048
    assert gpu.layout_copies_bytes == 0
    assert cpu.workspace_bytes == cpu.driver_bytes == 0
    assert gpu.driver_bytes > 0
    assert gpu.total_bytes == gpu.experts_bytes + gpu.rest_bytes + gpu.kv_cache_bytes + gpu.workspace_bytes
    fp32 = plan_memory(NLLB_54B, EngineConfig(precision="fp32"))
    assert fp32.experts_bytes == expert_bytes(NLLB_54B, "fp32")
    assert fp32.layout_copies_bytes == 4 * 256206 * 2048


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_planned_weights_are_the_tensors_that_are_loaded(overrides: dict[str, bool], dtype: str) -> None:
    """All but the experts' matrices, buffer by buffer; the padding of the vocabulary is in no plan."""
    config = ModelConfig.from_dict(make_tiny_model(seed=0, **TINY_ODD, **overrides).config.to_dict())
    options = {"dtype": getattr(torch, dtype), "device": torch.device("cpu"), "scheme": QuantScheme(4), "max_tokens": 8}
    places = map_places(allocate_transformer(config, **options)).values()
    held = {place.destination.data_ptr(): place.destination.nbytes for place in places if isinstance(place, TensorPlace)}
    assert plan_memory(config, EngineConfig(activation_dtype=dtype)).rest_bytes == sum(held.values())


@pytest.mark.parametrize(
    ("device", "dtype", "item_bytes"), [("cpu", "float32", 0), ("cpu", "float16", 2), ("cuda", "bfloat16", 2)]
)
def test_an_output_projection_of_its_own_costs_its_bytes(device: str, dtype: str, item_bytes: int) -> None:
    """Once; where the CPU's library wants a layout of its own, a tied one is held twice anyway."""
    config = EngineConfig(precision="w4a16", device=device, activation_dtype=dtype)
    untied = replace(NLLB_54B, tie_word_embeddings=False)
    more = plan_memory(untied, config).total_bytes - plan_memory(NLLB_54B, config).total_bytes
    assert more == item_bytes * 256206 * 2048


def test_the_workspace_of_a_gpu_is_that_of_the_largest_pass() -> None:
    """A large step is bound by its float32 logits; a large encoder pass by its experts or its keys and values."""
    config = EngineConfig(precision="w4a16", device="cuda", max_rows=64, max_source_slots=16, encode_token_budget=2048)
    small = plan_memory(NLLB_54B, config).workspace_bytes
    rows = plan_memory(NLLB_54B, replace(config, max_rows=1064)).workspace_bytes
    tokens = plan_memory(NLLB_54B, replace(config, encode_token_budget=4096)).workspace_bytes
    product = 2 * 8192
    assert rows > 1080 * 4 * 256206
    keys_and_values = 2 * 2 * 2048 * 24
    router = 4 * 16 * 128
    assert tokens - small == 2048 * (keys_and_values + 2 * 2 * 2048 + product + router)


def test_one_expert_a_token_needs_half_the_pairs() -> None:
    """Where the experts of an encoder pass bound the workspace: one output of either matrix less for each token."""
    config = EngineConfig(precision="w4a16", device="cuda", encode_token_budget=8192, max_rows=16, max_source_slots=16)
    two = replace(NLLB_54B, decoder_layers=4, vocab_size=1000)
    one = replace(two, num_experts_per_tok=1)
    saved = plan_memory(two, config).workspace_bytes - plan_memory(one, config).workspace_bytes
    assert saved == 8192 * 2 * (8192 + 2048)
    assert count_parameters(one) == count_parameters(two)


def test_logits_of_ngram_rules_are_planned_beside_the_total() -> None:
    """By row, and a reordered copy while that is made; a service that no one asks for such a rule never takes them."""
    gpu = EngineConfig(precision="w4a16", device="cuda", max_rows=320, max_source_slots=80)
    plan = plan_memory(NLLB_54B, gpu)
    logits = torch.empty((400, 256256), dtype=torch.float32, device="meta").nbytes
    assert plan.ngram_bytes == 2 * logits
    assert plan.total_bytes == plan.experts_bytes + plan.rest_bytes + plan.kv_cache_bytes + plan.workspace_bytes
    assert plan_memory(NLLB_54B, replace(gpu, device="cpu")).ngram_bytes == 0


def test_what_fits() -> None:
    assert fitting_precisions(NLLB_54B, 80 * 10**9) == (
        "w8a16", "w8a16-g128", "w8a16-g64", "w4a16", "w4a16-g128", "w4a16-g64"
    )  # fmt: skip
    assert fitting_precisions(NLLB_54B, 10**9) == ()
    assert fitting_precisions(NLLB_54B, 10**12) == PRECISIONS


def test_accounting_loads_no_torch() -> None:
    code = "import sys, engine.accounting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
