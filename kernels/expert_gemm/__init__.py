"""Grouped GEMM over experts with int4 / int8 / bf16 weights, and the packed layout it reads."""

from kernels.expert_gemm.launcher import expert_ffn, expert_gemm, first_weights
from kernels.expert_gemm.packing import LAYOUT_VERSION, PackedExperts, pack, unpack, unquantized
from kernels.expert_gemm.reference import dequantize_reference, expert_ffn_reference, expert_gemm_reference
from kernels.expert_gemm.tiles import FfnTiles, block_tokens, default_tiles, select_tiles

__all__ = [
    "LAYOUT_VERSION",
    "FfnTiles",
    "PackedExperts",
    "block_tokens",
    "default_tiles",
    "dequantize_reference",
    "expert_ffn",
    "expert_ffn_reference",
    "expert_gemm",
    "expert_gemm_reference",
    "first_weights",
    "pack",
    "select_tiles",
    "unpack",
    "unquantized",
]
