"""Launcher of `read_strips`. S strips of STRIP_WORDS words."""

from __future__ import annotations

import torch

from kernels.launch import check
from kernels.read_strips.reference import STRIP_WORDS

_BLOCK = 4096


def read_strips(words: torch.Tensor) -> torch.Tensor:
    """int32 words [S * STRIP_WORDS] -> the sum of every strip, modulo 2^32: int32[S]. Every word is read, and read once; one
    program a strip. Raises ValueError for other words."""
    check(
        words.dtype == torch.int32 and words.dim() == 1 and words.is_contiguous() and words.numel() % STRIP_WORDS == 0,
        f"words are {words.dtype}{list(words.shape)}; want contiguous int32, a multiple of {STRIP_WORDS}",
    )
    from kernels.read_strips.kernel import read_strips_kernel

    sums = words.new_empty(words.numel() // STRIP_WORDS)
    if sums.numel():
        read_strips_kernel[(sums.numel(),)](words, sums, WORDS=STRIP_WORDS, BLOCK=_BLOCK, num_warps=4)
    return sums
