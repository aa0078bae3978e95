"""Compile jobs of `add_layernorm` and `add_slots`, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.add_layernorm.launcher import add_constants, norm_constants
from kernels.compile_ahead import Job

_MODULE = "kernels.add_layernorm.kernel"


def add_layernorm_jobs(d_model: int, top_k: int, dtype: torch.dtype) -> list[Job]:
    """Without and with expert outputs, and their sum alone."""
    outputs = (dtype, dtype, torch.int32)
    norm = (*outputs, dtype, dtype, dtype, 1e-5)
    return [
        (_MODULE, "add_layernorm_kernel", (*(dtype,) * 6, 1e-5), norm_constants(d_model, 0, masked=False)),
        (_MODULE, "add_layernorm_kernel", norm, norm_constants(d_model, top_k, masked=True)),
        (_MODULE, "add_slots_kernel", outputs, add_constants(d_model, top_k, masked=True)),
    ]
