"""Compile jobs of encoder attention: the argument types of a real launch, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.compile_ahead import Job
from kernels.encoder_attention.launcher import constants, select_tiles


def encoder_attention_jobs(d_model: int, num_heads: int, dtype: torch.dtype) -> list[Job]:
    """The kernel with the tiles of this head_dim."""
    head_dim = d_model // num_heads
    chosen = constants(num_heads, head_dim, select_tiles(head_dim, dtype))
    args = (dtype, torch.int32, torch.int32, dtype, 4096, 3 * d_model, 0.2)
    return [("kernels.encoder_attention.kernel", "encoder_attention_kernel", args, chosen)]
