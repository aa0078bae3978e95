"""The one list of shapes: what the tests check and what the benches time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FfnShape:
    """An expert layer: d_model, d_ff, experts, active experts a token."""

    name: str
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int


PAPER = FfnShape("paper", 1024, 4096, 32, 1)
NLLB_54B = FfnShape("54b", 2048, 8192, 128, 2)
FFN_SHAPES = {shape.name: shape for shape in (PAPER, NLLB_54B)}


@dataclass(frozen=True, slots=True)
class Precision:
    """How expert weights are stored: bits 4, 8, 16; group 0 = one scale per channel."""

    name: str
    bits: int
    group_size: int = 0


PRECISIONS = {
    p.name: p
    for p in (
        Precision("w4a16", 4),
        Precision("w8a16", 8),
        Precision("bf16", 16),
        Precision("w4a16-g128", 4, 128),
        Precision("w4a16-g64", 4, 64),
        Precision("w8a16-g128", 8, 128),
        Precision("w8a16-g64", 8, 64),
    )
}

DECODE_TOKENS = (1, 4, 16, 64, 320)
ENCODE_TOKENS = (1024, 4096, 16384)
TABLE1_TOKENS = 40  # the paper's Table 1: tokens, and how many experts they hit
TABLE1_EXPERTS = (1, 4, 8, 16, 24, 32)
