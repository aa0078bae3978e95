"""Linear maps over few rows: layer norm folded in; bias, ReLU, residual or cache behind; 16-bit or int8 weights."""

from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.small_linear.folded import FoldedLinear, fold_norm
from kernels.small_linear.launcher import qkv_linear, small_linear
from kernels.small_linear.reference import qkv_linear_reference, small_linear_reference
from kernels.small_linear.scratch import LinearScratch, linear_scratch
from kernels.small_linear.tiles import LinearTiles

__all__ = [
    "FoldedLinear",
    "Int8Linear",
    "LinearScratch",
    "LinearTiles",
    "fold_norm",
    "linear_scratch",
    "qkv_linear",
    "qkv_linear_reference",
    "quantize_int8",
    "small_linear",
    "small_linear_reference",
]
