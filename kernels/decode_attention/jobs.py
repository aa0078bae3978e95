"""Compile jobs of the decode attention kernels: the argument types of a real launch, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.compile_ahead import Job
from kernels.decode_attention.launcher import CROSS_TILES, SELF_TILES, cross_constants, scale_log2, self_constants

_MODULE = "kernels.decode_attention.kernel"


def decode_attention_jobs(d_model: int, num_heads: int, dtype: torch.dtype) -> list[Job]:
    """Both kernels with the tiles of this head_dim; strides as of a captured step (multiples of 16)."""
    i32, head_dim = torch.int32, d_model // num_heads
    scale = scale_log2(head_dim)
    own = self_constants(num_heads, head_dim, dtype, SELF_TILES[head_dim])
    cross = cross_constants(num_heads, head_dim, CROSS_TILES[head_dim])
    jobs: list[Job] = []
    for ahead in ({"AHEAD": False}, {"AHEAD": True}):
        jobs += [
            (
                _MODULE,
                "decode_self_attention_kernel",
                (dtype, dtype, *(i32,) * 3, dtype, 320, 3072, 65536, 129, scale),
                own | ahead,
            ),
            (
                _MODULE,
                "decode_cross_attention_kernel",
                (dtype, dtype, *(i32,) * 4, dtype, 3072, 65536, scale),
                cross | ahead,
            ),
        ]
    return jobs
