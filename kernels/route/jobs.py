"""Compile jobs of the router, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.compile_ahead import Job
from kernels.route.constants import few_constants, finish_constants, gate_constants, order_constants
from kernels.route.folded import serves
from kernels.route.tiles import GateTiles


def route_jobs(
    d_model: int, num_experts: int, top_k: int, dtype: torch.dtype, tiles: GateTiles, *, block_tokens: int = 16
) -> list[Job]:
    """Compile jobs of one router: few tokens, a step of 320 and an encoder's 4,096 tokens."""
    f32, i32 = torch.float32, torch.int32
    flags = {"HAS_BIAS": False, "HAS_ACTIVE": True}
    few = few_constants(d_model, num_experts, top_k, block_tokens, dtype) | flags
    lists = (i32,) * 7
    head = (dtype, f32, f32, torch.uint8, f32, i32, i32, f32)
    jobs: list[Job] = [("kernels.route.few", "route_few_kernel", (*head, *lists, 17, 400, 0.8), few)]
    gate = gate_constants(d_model, num_experts, top_k, tiles, dtype, on_gpu=True) | flags
    jobs.append(("kernels.route.kernel", "gate_kernel", (dtype, f32, f32, torch.uint8, f32, i32, i32, f32, 320, 0.8), gate))
    for pairs in (320 * top_k, 4096 * top_k):
        order = order_constants(pairs, num_experts, block_tokens)
        jobs.append(("kernels.route.order", "expert_order_kernel", (*(i32,) * 9, pairs, 400, 20), order))
    if serves(d_model, num_experts, dtype):
        operands = (dtype, f32, f32, f32, f32, dtype, dtype, torch.uint8, dtype, i32, f32, 320, 1e-5, 0.8)
        finish = finish_constants(d_model, num_experts, top_k, dtype) | {"HAS_ACTIVE": True}
        jobs.append(("kernels.route.finish", "finish_route_kernel", operands, finish))
    return jobs
