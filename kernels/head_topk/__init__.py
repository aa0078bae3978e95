"""Final projection, log-softmax and the k best tokens of every row, without a table of log-probabilities."""

from kernels.head_topk.launcher import head_topk
from kernels.head_topk.logits import row_logits
from kernels.head_topk.operands import Int8Head, TopTokens, quantize_head
from kernels.head_topk.reference import head_topk_reference
from kernels.head_topk.tiles import INT8_ROWS_FROM, HeadTiles, fixed_tiles, select_tiles

__all__ = [
    "INT8_ROWS_FROM",
    "HeadTiles",
    "Int8Head",
    "TopTokens",
    "fixed_tiles",
    "head_topk",
    "head_topk_reference",
    "quantize_head",
    "row_logits",
    "select_tiles",
]
