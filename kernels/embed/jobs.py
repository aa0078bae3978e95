"""Compile jobs of the embedding kernel, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.compile_ahead import Job
from kernels.launch import next_power_of_two


def embed_jobs(d_model: int, dtype: torch.dtype) -> list[Job]:
    """Decoder (positions, with and without statistics) and encoder (rows given)."""
    block = min(1024, next_power_of_two(d_model))
    options = {"BLOCK": block, "num_warps": max(1, block // 256), "enable_fp_fusion": False}
    args = (torch.int32, torch.int32, dtype, dtype, dtype, torch.float32, 32.0, 17, 17, 1)
    return [
        ("kernels.embed.kernel", "embed_kernel", args, {"D": d_model, "GIVEN_ROWS": given, "LEAVE": leave, **options})
        for given, leave in ((False, False), (False, True), (True, False))
    ]
