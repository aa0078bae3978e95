"""What the launchers of decode attention check of their operands. Letters as in `launcher.py`."""

from __future__ import annotations

import torch

from kernels.decode_attention.tiles import SELF_TILES
from kernels.history_lists import HistoryLists
from kernels.launch import check

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # slots, first entries, counts: int32[G] each


def check_queries(q: torch.Tensor, num_heads: int) -> tuple[int, int]:
    """(R, Dh) of well-formed queries."""
    check(q.dim() == 2, f"q is {tuple(q.shape)}; want [R, D]")
    check(q.dtype in _DTYPES, f"q is {q.dtype}; want float32, float16 or bfloat16")
    check(q.stride(1) == 1, "q must have contiguous rows: call .contiguous()")
    check(num_heads > 0 and q.shape[1] % num_heads == 0, f"D = {q.shape[1]} does not divide into {num_heads} heads")
    head_dim = q.shape[1] // num_heads
    check(head_dim in SELF_TILES, f"head_dim is {head_dim}; choose num_heads so that it is one of {list(SELF_TILES)}")
    return q.shape[0], head_dim


def check_cells(name: str, cells: torch.Tensor, q: torch.Tensor, num_heads: int) -> None:
    """One layer of a cache that fits the queries."""
    want = (2, num_heads, q.shape[1] // num_heads)
    check(cells.dim() == 5 and tuple(cells.shape[2:]) == want, f"{name} is {tuple(cells.shape)}; want [.., .., *{want}]")
    check(cells.dtype == q.dtype, f"{name} is {cells.dtype} and q {q.dtype}; convert one of them")
    check(cells.is_contiguous(), f"{name} must be contiguous: pass one layer of the cache")
    check(cells.device == q.device, f"{name} is on {cells.device} and q on {q.device}; move one of them")


def check_index(name: str, index: torch.Tensor, shape: tuple[int, ...]) -> None:
    """int32, contiguous, of this shape."""
    check(tuple(index.shape) == tuple(shape), f"{name} is {tuple(index.shape)}; want {list(shape)}")
    check(index.dtype == torch.int32, f"{name} is {index.dtype}; convert it to int32")
    check(index.is_contiguous(), f"{name} must be contiguous: call .contiguous()")


def check_lists(lists: HistoryLists, cells: torch.Tensor) -> None:
    """Lists that number these cells."""
    want = cells.shape[1]
    check(lists.max_positions == want, f"lists number cells of {lists.max_positions} positions a row; these have {want}")
    check(lists.words.device == cells.device, f"lists are on {lists.words.device}, cells on {cells.device}; move one")


def check_groups(groups: Groups) -> int:
    """G of well-formed groups."""
    num_groups = groups[0].numel()
    for name, index in zip(("group_slots", "group_starts", "group_counts"), groups, strict=True):
        check_index(name, index, (num_groups,))
    return num_groups


def output_like(q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """`out`, if it fits the queries, or a new one."""
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check(
        out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(),
        f"out is {out.dtype}{tuple(out.shape)}; want contiguous {q.dtype}{tuple(q.shape)}",
    )
    return out
