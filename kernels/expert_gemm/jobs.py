"""Compile jobs of the expert kernels: the argument types of a real launch, for `kernels.compile_ahead`."""

from __future__ import annotations

from typing import Any

import torch

from kernels.compile_ahead import Job
from kernels.expert_gemm.hopper.launcher import pipelined_constants
from kernels.expert_gemm.launcher import ffn_constants, gemm_constants, launch_options
from kernels.expert_gemm.tiles import FfnTiles

_MODULE = "kernels.expert_gemm.kernel"
_FUSED = "kernels.expert_gemm.fused"
_PIPELINED = "kernels.expert_gemm.hopper.kernel"


def ffn_jobs(
    d_model: int, d_ff: int, top_k: int, bits: int, group_size: int, tiles: FfnTiles, dtype: torch.dtype = torch.bfloat16
) -> list[Job]:
    """Jobs that cover one expert FFN call with these tiles: one pipelined or fused kernel, or two plain ones."""
    i32, f32 = torch.int32, torch.float32
    weight = dtype if bits == 16 else i32
    scale = dtype if bits == 16 else f32
    if tiles.pipelined:
        operands: tuple[Any, ...] = (dtype, i32, f32, dtype, i32, f32, dtype, f32, i32, i32, i32, dtype, dtype, i32)
        return [
            (_PIPELINED, "expert_ffn_pipelined_kernel", operands, pipelined_constants(d_model, d_ff, top_k, bits, tiles))
        ]
    options = launch_options(tiles, on_gpu=True)
    if tiles.fused:
        partial = dtype if tiles.split == 1 else f32
        args: tuple[Any, ...] = (
            dtype,
            weight,
            scale,
            dtype,
            weight,
            scale,
            dtype,
            f32,
            i32,
            i32,
            i32,
            dtype,
            dtype,
            partial,
            i32,
            64,
            64,
        )
        constants = ffn_constants(d_model, d_ff, top_k, bits, group_size, tiles, asm=True, on_gpu=True)
        return [(_FUSED, "expert_ffn_kernel", args, {**constants, **options})]
    args = (dtype, weight, scale, dtype, f32, i32, i32, i32, dtype)
    return [
        (
            _MODULE,
            "expert_gemm_kernel",
            args,
            {**gemm_constants(n, k, top_k, bits, group_size, tiles, first, asm=True), **options},
        )
        for n, k, first in ((d_ff, d_model, True), (d_model, d_ff, False))
    ]
