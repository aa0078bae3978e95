"""Compile-time arguments of the router's kernels: what the launcher and the compile jobs have in common."""

from __future__ import annotations

from typing import Any

import torch

from kernels.launch import next_power_of_two
from kernels.route.tiles import FEW_TOKENS, GateTiles

_FEW_FEATURES = 64  # a program, where tokens are few
_LARGEST_CHUNK = 2048
_FINISHED_ROWS = 4  # a program, a warp each


def gate_constants(
    d_model: int, num_experts: int, top_k: int, tiles: GateTiles, dtype: torch.dtype, *, on_gpu: bool
) -> dict[str, Any]:
    """`gate_kernel`. Three bf16 products take the place of tf32x3 on a GPU; the interpreter's bf16 arithmetic is wrong."""
    return {
        "D": d_model,
        "E": num_experts,
        "E_PAD": max(16 * tiles.expert_parts, next_power_of_two(num_experts)),
        "TOP_K": top_k,
        "BT": tiles.tokens,
        "KC": tiles.features,
        "SPLIT": tiles.split,
        "EXPERT_PARTS": tiles.expert_parts,
        "CHOOSE": min(tiles.warps, tiles.tokens),
        "STAGES": tiles.stages,
        "THIRDS": dtype == torch.bfloat16 and on_gpu,
        "EPS": torch.finfo(dtype).eps,
        "num_warps": tiles.warps,
    }


def few_constants(d_model: int, num_experts: int, top_k: int, block_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """`route_few_kernel`."""
    padded = max(16, next_power_of_two(num_experts))
    return {
        "D": d_model,
        "E": num_experts,
        "E_PAD": padded,
        "TOP_K": top_k,
        "BT": FEW_TOKENS,
        "KC": min(_FEW_FEATURES, max(16, next_power_of_two(d_model))),
        "BLOCK_TOKENS": block_tokens,
        "EPS": torch.finfo(dtype).eps,
        "num_warps": 4 if padded <= 32 else 8,
    }


def finish_constants(d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> dict[str, Any]:
    """`finish_route_kernel`: a warp chooses for a row, and all of a program's warps norm each of its rows."""
    return {
        "D": d_model,
        "E": num_experts,
        "TOP_K": top_k,
        "ROWS": _FINISHED_ROWS,
        "EPS": torch.finfo(dtype).eps,
        "num_warps": _FINISHED_ROWS,
    }


def order_constants(num_pairs: int, num_experts: int, block_tokens: int) -> dict[str, Any]:
    """`expert_order_kernel`."""
    chunk = min(_LARGEST_CHUNK, max(128, next_power_of_two(num_pairs)))
    return {
        "E": num_experts,
        "E_PAD": next_power_of_two(num_experts),
        "BLOCK_TOKENS": block_tokens,
        "CHUNK": chunk,
        "ONE_CHUNK": num_pairs <= chunk,
        "num_warps": 4 if chunk <= 512 else 8,
    }
