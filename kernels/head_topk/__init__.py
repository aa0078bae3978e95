"""Final projection, log-softmax and the k best tokens of every row, without a table of log-probabilities."""

from kernels.head_topk.launcher import head_topk
from kernels.head_topk.logits import row_logits
from kernels.head_topk.operands import TopTokens
from kernels.head_topk.reference import head_topk_reference
from kernels.head_topk.tiles import HeadTiles, fixed_tiles, select_tiles

__all__ = [
    "HeadTiles",
    "TopTokens",
    "fixed_tiles",
    "head_topk",
    "head_topk_reference",
    "row_logits",
    "select_tiles",
]
