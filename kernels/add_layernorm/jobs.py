"""Compile jobs of `add_layernorm`, `add_layernorm_int8` and `add_slots`, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.add_layernorm.launcher import add_constants, norm_constants
from kernels.compile_ahead import Job

_MODULE = "kernels.add_layernorm.kernel"


def add_layernorm_jobs(d_model: int, top_k: int, dtype: torch.dtype) -> list[Job]:
    """Without and with expert outputs, and their sum alone; in int8 with and without the norm's weight and bias."""
    outputs = (dtype, dtype, torch.int32)
    norm = (*outputs, dtype, dtype, dtype, 1e-5)
    quantized = (*(dtype,) * 5, torch.int8, torch.float32, 1e-5)
    masked = (*outputs, dtype, dtype, torch.int8, torch.float32, 1e-5)
    bare, full = norm_constants(d_model, 0, masked=False), norm_constants(d_model, top_k, masked=True)
    add = add_constants(d_model, top_k, masked=True)
    int8 = "add_layernorm_int8_kernel"
    return [
        *((_MODULE, int8, quantized, bare | {"AFFINE": affine}) for affine in (False, True)),
        *((_MODULE, int8, masked, full | {"AFFINE": affine}) for affine in (False, True)),
        (_MODULE, "add_layernorm_kernel", (*(dtype,) * 6, 1e-5), norm_constants(d_model, 0, masked=False)),
        (_MODULE, "add_layernorm_kernel", norm, norm_constants(d_model, top_k, masked=True)),
        *((_MODULE, "add_slots_kernel", (*outputs, torch.float32), add | {"LEAVE": leave}) for leave in (False, True)),
    ]
