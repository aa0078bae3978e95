"""Slow twin of `read_strips`."""

from __future__ import annotations

import torch

STRIP_WORDS = 32768  # 128 KB in one piece: a strip of 64 int8 rows of 2,048 input features


def read_strips_reference(words: torch.Tensor) -> torch.Tensor:
    """Sum of every strip, modulo 2^32 as int32 wraps round: int32[S]."""
    exact = words.view(-1, STRIP_WORDS).sum(dim=1, dtype=torch.int64)
    return ((exact + 2**31) % 2**32 - 2**31).int()
