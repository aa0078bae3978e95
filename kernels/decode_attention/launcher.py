"""Launchers of decode attention. R entries of the batch, N cache rows, T_max target positions, P source slots, G groups,
H heads, Dh head_dim, D = H * Dh.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kernels.launch import check, overlap

MAX_GROUP = 16  # entries of one source slot that a program takes: the smallest number of rows of a tensor-core dot
MAX_AHEAD = (
    1584  # programs that find room at once (12 on each of 132 multiprocessors): more would only wait in each other's way
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SelfTiles(NamedTuple):
    """Entries of a program, warps that share an entry's positions, positions a thread asks for at once."""

    entries: int
    warps: int
    steps: int


class CrossTiles(NamedTuple):
    """Source positions a step of the loop, and how."""

    positions: int
    num_warps: int
    stages: int


# By head_dim alone, never by R or G: an entry's bits do not depend on its batch.
SELF_TILES = {16: SelfTiles(4, 1, 2), 32: SelfTiles(4, 1, 4), 64: SelfTiles(1, 1, 8), 128: SelfTiles(1, 1, 8)}
CROSS_TILES = {16: CrossTiles(32, 2, 3), 32: CrossTiles(32, 2, 3), 64: CrossTiles(32, 2, 3), 128: CrossTiles(32, 2, 3)}


def decode_self_attention(
    q: torch.Tensor,
    cells: torch.Tensor,
    ancestry: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    out: torch.Tensor | None = None,
    tiles: SelfTiles | None = None,
    history_ready: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every entry over positions 0..positions[e] of its hypothesis -> out [R, D].

    q fp32/fp16/bf16[R, D], any row stride; cells like q [N, T_max, 2, H, Dh] (key, value); ancestry int32[N, T >= T_max]:
    the cache row that holds position t of the hypothesis living in row n; rows int32[R]: cache row of an entry, -1 for
    an inactive entry (nothing of it is read, zeros are written); positions int32[R]. The entry's own key and value are in
    cells[rows[e], positions[e]], earlier ones in cells[ancestry[rows[e], t], t]. No other cell and no other column of
    ancestry is read. Rows, positions and ancestry within bounds are the caller's duty: they are not looked at here.
    Softmax and sums in fp32. One launch whose time follows positions. Same bits whatever else is in the batch.
    history_ready: the caller knows that no launch still running when this one may start (see `kernels.launch`) writes rows,
    positions, ancestry or earlier cells: then few entries read their first cells before they wait for q.
    Raises ValueError for shapes, types or strides that do not fit.
    """
    num_entries, head_dim = _check_queries(q, num_heads)
    _check_cells("cells", cells, q, num_heads)
    check(
        ancestry.dim() == 2 and ancestry.shape[0] == cells.shape[0] and ancestry.shape[1] >= cells.shape[1],
        f"ancestry is {tuple(ancestry.shape)}; want [{cells.shape[0]}, at least {cells.shape[1]}]",
    )
    _check_index("ancestry", ancestry, ancestry.shape)
    _check_index("rows", rows, (num_entries,))
    _check_index("positions", positions, (num_entries,))
    out = _output(q, out)
    if num_entries == 0:
        return out
    from kernels.decode_attention.kernel import decode_self_attention_kernel

    tiles = tiles or SELF_TILES[head_dim]
    decode_self_attention_kernel[(num_heads, -(-num_entries // tiles.entries))](
        q,
        cells,
        ancestry,
        rows,
        positions,
        out,
        num_entries,
        q.stride(0),
        cells.stride(0),
        ancestry.stride(0),
        scale_log2(head_dim),
        **self_constants(num_heads, head_dim, q.dtype, tiles),
        AHEAD=history_ready and num_entries * num_heads <= MAX_AHEAD,
        **overlap(q),
    )
    return out


def decode_cross_attention(
    q: torch.Tensor,
    cross_cells: torch.Tensor,
    source_lengths: torch.Tensor,
    group_slots: torch.Tensor,
    group_starts: torch.Tensor,
    group_counts: torch.Tensor,
    *,
    num_heads: int,
    out: torch.Tensor | None = None,
    tiles: CrossTiles | None = None,
    source_ready: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every entry over the source sentence of its group -> out [R, D].

    q fp32/fp16/bf16[R, D], any row stride; cross_cells like q [P, S_max, 2, H, Dh] (key, value); source_lengths int32[P]
    (cells past it are not read; length 0 gives zeros). Group g is entries group_starts[g] .. + group_counts[g] - 1, all of
    source slot group_slots[g]; all three int32[G]. Slot -1 or count 0: an unused group. Counts up to 16; entries beyond
    are ignored. **Entries of no group are not written**: what `out` held stays (garbage in a fresh one). Indices within
    bounds are the caller's duty. Softmax in fp32. One launch. Same bits whatever the other groups hold.
    source_ready: the caller knows that no launch still running when this one may start writes anything of this but q: then
    first cells are read before q is waited for.
    Raises ValueError for shapes, types or strides that do not fit.
    """
    _, head_dim = _check_queries(q, num_heads)
    _check_cells("cross_cells", cross_cells, q, num_heads)
    _check_index("source_lengths", source_lengths, (cross_cells.shape[0],))
    num_groups = group_slots.numel()
    for name, index in (("group_slots", group_slots), ("group_starts", group_starts), ("group_counts", group_counts)):
        _check_index(name, index, (num_groups,))
    out = _output(q, out)
    if num_groups == 0:
        return out
    from kernels.decode_attention.kernel import decode_cross_attention_kernel

    decode_cross_attention_kernel[(num_heads, num_groups)](
        q,
        cross_cells,
        source_lengths,
        group_slots,
        group_starts,
        group_counts,
        out,
        q.stride(0),
        cross_cells.stride(0),
        scale_log2(head_dim),
        **cross_constants(num_heads, head_dim, tiles or CROSS_TILES[head_dim]),
        AHEAD=source_ready,
        **overlap(q),
    )
    return out


def scale_log2(head_dim: int) -> float:
    """Factor that turns q k^T into the exponent of two of a softmax weight."""
    return math.log2(math.e) / math.sqrt(head_dim)


def self_constants(num_heads: int, head_dim: int, dtype: torch.dtype, tiles: SelfTiles) -> dict[str, int]:
    """Compile-time arguments of decode_self_attention_kernel: a thread loads 16 bytes, so a warp 512 / (Dh * size) cells."""
    lanes = tiles.warps * 512 // (head_dim * dtype.itemsize)
    return {
        "H": num_heads,
        "DH": head_dim,
        "BE": tiles.entries,
        "BT": lanes * tiles.steps,
        "LANES": lanes,
        "num_warps": tiles.entries * tiles.warps,
    }


def cross_constants(num_heads: int, head_dim: int, tiles: CrossTiles) -> dict[str, int]:
    """Compile-time arguments of decode_cross_attention_kernel."""
    return {
        "H": num_heads,
        "DH": head_dim,
        "BE": MAX_GROUP,
        "BS": tiles.positions,
        "STAGES": tiles.stages,
        "num_warps": tiles.num_warps,
    }


def _check_queries(q: torch.Tensor, num_heads: int) -> tuple[int, int]:
    """(R, Dh) of well-formed queries."""
    check(q.dim() == 2, f"q is {tuple(q.shape)}; want [R, D]")
    check(q.dtype in _DTYPES, f"q is {q.dtype}; want float32, float16 or bfloat16")
    check(q.stride(1) == 1, "q must have contiguous rows: call .contiguous()")
    check(num_heads > 0 and q.shape[1] % num_heads == 0, f"D = {q.shape[1]} does not divide into {num_heads} heads")
    head_dim = q.shape[1] // num_heads
    check(head_dim in SELF_TILES, f"head_dim is {head_dim}; choose num_heads so that it is one of {list(SELF_TILES)}")
    return q.shape[0], head_dim


def _check_cells(name: str, cells: torch.Tensor, q: torch.Tensor, num_heads: int) -> None:
    want = (2, num_heads, q.shape[1] // num_heads)
    check(cells.dim() == 5 and tuple(cells.shape[2:]) == want, f"{name} is {tuple(cells.shape)}; want [.., .., *{want}]")
    check(cells.dtype == q.dtype, f"{name} is {cells.dtype} and q {q.dtype}; convert one of them")
    check(cells.is_contiguous(), f"{name} must be contiguous: pass one layer of the cache")
    check(cells.device == q.device, f"{name} is on {cells.device} and q on {q.device}; move one of them")


def _check_index(name: str, index: torch.Tensor, shape: tuple[int, ...]) -> None:
    check(tuple(index.shape) == tuple(shape), f"{name} is {tuple(index.shape)}; want {list(shape)}")
    check(index.dtype == torch.int32, f"{name} is {index.dtype}; convert it to int32")
    check(index.is_contiguous(), f"{name} must be contiguous: call .contiguous()")


def _output(q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check(
        out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(),
        f"out is {out.dtype}{tuple(out.shape)}; want contiguous {q.dtype}{tuple(q.shape)}",
    )
    return out
