from __future__ import annotations

import pytest

from engine.accounting import count_parameters
from engine.bench.floor import StepPart, decode_step_bytes, step_bytes_by_part
from engine.bench.shapes import GRID, PAPER_RATIOS, SHAPES, Cell, Variant, parse_cells
from engine.config import EngineConfig, ModelConfig


@pytest.mark.parametrize(("shape", "billions"), [("paper", 5.319), ("nllb54b", 54.501)])
def test_published_sizes(shape: str, billions: float) -> None:
    counts = count_parameters(SHAPES[shape])
    total = counts.experts + counts.routers + counts.embedding + counts.dense
    assert round(total / 1e9, 3) == billions


def test_cells_and_variants_are_read_and_refused() -> None:
    assert parse_cells("1x2, 96x1,1x2") == (Cell(1, 2), Cell(96, 1))
    assert Cell(64, 4).rows == 256
    assert {Cell(1, 2), Cell(96, 1)} <= PAPER_RATIOS.keys() & set(GRID)
    assert Variant.parse("w4a16+d8+inv") == Variant("w4a16", int8_dense=True, batch_invariant=True)
    assert str(Variant.parse("bf16+inv")) == "bf16+inv"
    for wrong in ("96", "0x1", "1x9", "x", "1x", "-1x2"):
        with pytest.raises(ValueError, match="cell"):
            parse_cells(wrong)
    for wrong in ("int4", "w4a16+d4", ""):
        with pytest.raises(ValueError, match="choose one of"):
            Variant.parse(wrong)


def test_the_floor_counts_what_a_step_reads() -> None:
    """By hand, for a model small enough to write down: 1 dense and 1 sparse decoder layer."""
    config = ModelConfig(
        vocab_size=100,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=32,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=4,
    )
    attention = 2 * (4 * 72 + 2 * 72 + 3 * 16)  # self, cross query and output, three norms; two layers
    dense = attention + (8 * 32 + 32 + 32 * 8 + 8) + 16 + 100 * 8
    expert_bf16 = 2 * 256 * 2 + 40 * 2
    expert_int4 = 256 / 2 + 32 * 2 + 256 / 2 + 8 * 2 + 40 * 2
    router, cache = 4 * 8 * 4, 2 * 8 * 2 * (6 * 10 / 2 + 3 * 5) * 2

    def step(precision: str, *, int8_dense: bool = False) -> int:
        engine = EngineConfig(precision=precision, int8_dense=int8_dense)
        cell = Cell(3, 2)
        return decode_step_bytes(config, engine, cell, experts_touched=2.5, source_tokens=5, target_tokens=10)

    assert step("bf16") == dense * 2 + 2.5 * expert_bf16 + router + cache
    assert step("w4a16") == dense * 2 + 2.5 * expert_int4 + router + cache
    in_int8 = 2 * 3 * 64 + 8 * 32 + 100 * 8  # queries, keys and values of two layers, one dense fc1, the output projection
    assert step("w4a16", int8_dense=True) == dense * 2 - in_int8 + 2.5 * expert_int4 + router + cache
    engine = EngineConfig(precision="w4a16", int8_dense=True)
    parts = step_bytes_by_part(config, engine, Cell(3, 2), experts_touched=2.5, source_tokens=5, target_tokens=10)
    assert parts.keys() == set(StepPart)
    assert sum(parts.values()) == step("w4a16", int8_dense=True)
    assert parts[StepPart.EXPERTS] == 2.5 * expert_int4
    assert parts[StepPart.ROUTER] == router + 16 * 2
    assert parts[StepPart.FIRST_DENSE] == 8 * 32 + (32 + 16) * 2
    assert parts[StepPart.SELF_ATTENTION] + parts[StepPart.CROSS_ATTENTION] == cache
