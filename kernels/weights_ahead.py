"""Weights that a launch asks for in L2 on behalf of one behind it: while small launches run, memory is half idle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from kernels.launch import check

_PIECE = 16 << 10  # bytes of one request


@dataclass(frozen=True, slots=True)
class WeightsAhead:
    """`pieces` pieces of `size` bytes, `stride` bytes apart from the start of `weights`, in the order of reading. A wrong
    guess costs its bytes and no more: asking changes no result, and what has left L2 again is read from memory.

    Raises ValueError for pieces that the copy engine does not take, or that do not lie within the weights.
    """

    weights: torch.Tensor
    pieces: int
    size: int
    stride: int

    def __post_init__(self) -> None:
        held = self.weights.numel() * self.weights.element_size()
        check(
            self.size > 0 and self.size % 16 == 0 and self.stride % 16 == 0 and self.weights.data_ptr() % 16 == 0,
            f"pieces of {self.size} bytes every {self.stride}: the copy engine wants multiples of 16",
        )
        check(
            self.pieces > 0 and (self.pieces - 1) * self.stride + self.size <= held and self.weights.is_contiguous(),
            f"{self.pieces} pieces of {self.size} bytes every {self.stride} do not lie within {held} contiguous bytes",
        )

    @classmethod
    def whole(cls, weights: torch.Tensor, limit: int) -> Self | None:
        """All of a matrix; None for one of more than `limit` bytes, or not of whole pieces of 16 KB."""
        held = weights.numel() * weights.element_size()
        return cls(weights, held // _PIECE, _PIECE, _PIECE) if held <= limit and held % _PIECE == 0 else None


def ahead_constants(ahead: WeightsAhead | None) -> dict[str, int]:
    """Compile-time arguments of a kernel that can ask. PIECES 0: for nothing."""
    if ahead is None:
        return {"PIECES": 0, "SIZE": 0, "STRIDE": 0}
    return {"PIECES": ahead.pieces, "SIZE": ahead.size, "STRIDE": ahead.stride}
