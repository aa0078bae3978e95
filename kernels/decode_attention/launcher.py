"""Launchers of decode attention. R entries of the batch, N cache rows, T_max target positions, P source slots, G groups,
H heads, Dh head_dim, D = H * Dh.

Two kernels each: `kernel.py` runs everywhere, an entry's or a group's head a program. `grouped.py` is for 16 bits on Hopper:
what costs there is the number of programs (1.25 ns each, and an engine's unused groups are programs too), so several heads
share one, and the beams of a sentence share what they read of their histories.
"""

from __future__ import annotations

import functools

import torch

from kernels.decode_attention.tiles import (
    CROSS_GROUP_TILES,
    CROSS_TILES,
    MANY_GROUPS,
    MAX_AHEAD,
    SELF_GROUP_TILES,
    SELF_TILES,
    CrossTiles,
    GroupTiles,
    SelfTiles,
    cross_constants,
    group_constants,
    scale_log2,
    self_constants,
)
from kernels.launch import check, overlap

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # slots, first entries, counts: int32[G] each


def decode_self_attention(
    q: torch.Tensor,
    cells: torch.Tensor,
    ancestry: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    out: torch.Tensor | None = None,
    tiles: SelfTiles | GroupTiles | None = None,
    history_ready: bool = False,
    groups: Groups | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every entry over positions 0..positions[e] of its hypothesis -> out [R, D].

    q fp32/fp16/bf16[R, D], any row stride; cells like q [N, T_max, 2, H, Dh] (key, value); ancestry int32[N, T >= T_max]:
    the cache row that holds position t of the hypothesis living in row n; rows int32[R]: cache row of an entry, -1 for
    an inactive entry (nothing of it is read, zeros are written); positions int32[R]. The entry's own key and value are in
    cells[rows[e], positions[e]], earlier ones in cells[ancestry[rows[e], t], t]. No other cell and no other column of
    ancestry is read. Rows, positions and ancestry within bounds are the caller's duty: they are not looked at here.
    Softmax and sums in fp32. One launch whose time follows positions. Same bits whatever else is in the batch.
    history_ready: the caller knows that no launch still running when this one may start writes rows, positions, ancestry or
    earlier cells, but for the cell of position 0 of an entry at position 1 (a sentence's start token may be fed in the same
    step): then these are read before q is waited for (by many entries only with groups). Such a launch, like those
    of `small_linear`, lets the next one start before it waits itself: "still running" reaches back to the last launch that
    waits first (see `kernels.launch`).
    groups: (slots, first entries, counts), as of `decode_cross_attention`: runs of up to 8 entries that stand at one
    position and are active or inactive together. Many entries in 16 bits on Hopper are then worked off by groups, with what
    their histories share read once: entries of no group may then be left unwritten; an entry's bits may depend on the
    histories of its own group, and differ from those without groups; a NaN in a cell reaches its whole group.
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
    if groups is not None:
        _check_groups(groups)
    out = _output(q, out)
    if num_entries == 0:
        return out
    few = num_entries * num_heads <= MAX_AHEAD
    if tiles is None and groups is not None and not few and head_dim in SELF_GROUP_TILES and _takes_groups(q):
        tiles = SELF_GROUP_TILES[head_dim]
    if isinstance(tiles, GroupTiles):
        check(groups is not None and _takes_groups(q), "GroupTiles are for 16-bit groups on Hopper: leave out tiles")
        if groups is not None and groups[0].numel() > 0:
            _launch_self_groups(q, cells, ancestry, rows, positions, groups, out, num_heads, tiles, history_ready)
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
        AHEAD=history_ready and few,
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
    tiles: CrossTiles | GroupTiles | None = None,
    source_ready: bool = False,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every entry over the source sentence of its group -> out [R, D].

    q fp32/fp16/bf16[R, D], any row stride; cross_cells like q [P, S_max, 2, H, Dh] (key, value); source_lengths int32[P]
    (cells past it are not read; length 0 gives zeros). Group g is entries group_starts[g] .. + group_counts[g] - 1, all of
    source slot group_slots[g]; all three int32[G]. Slot -1 or count 0: an unused group. Counts up to 8; entries beyond
    are ignored. **Entries of no group are not written**: what `out` held stays (garbage in a fresh one). Indices within
    bounds are the caller's duty. Softmax in fp32. One launch. Same bits whatever the other groups hold.
    source_ready: the caller knows that no launch still running when this one may start writes anything of this but q: then
    first cells are read before q is waited for, and the next launch may start (as with history_ready).
    Raises ValueError for shapes, types or strides that do not fit.
    """
    _, head_dim = _check_queries(q, num_heads)
    _check_cells("cross_cells", cross_cells, q, num_heads)
    _check_index("source_lengths", source_lengths, (cross_cells.shape[0],))
    num_groups = _check_groups((group_slots, group_starts, group_counts))
    out = _output(q, out)
    if num_groups == 0:
        return out
    if tiles is None and head_dim in CROSS_GROUP_TILES and _takes_groups(q):
        tiles = CROSS_GROUP_TILES[head_dim][num_groups > MANY_GROUPS]
    if isinstance(tiles, GroupTiles):
        check(_takes_groups(q), "GroupTiles are for 16 bits on Hopper: leave out tiles")
        groups = group_slots, group_starts, group_counts
        _launch_cross_groups(q, cross_cells, source_lengths, groups, out, num_heads, tiles, source_ready)
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


def _launch_self_groups(
    q: torch.Tensor,
    cells: torch.Tensor,
    ancestry: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    groups: Groups,
    out: torch.Tensor,
    num_heads: int,
    tiles: GroupTiles,
    ready: bool,
) -> None:
    from kernels.decode_attention.grouped import self_group_kernel

    head_dim = q.shape[1] // num_heads
    constants = group_constants(num_heads, head_dim, tiles)
    self_group_kernel[(num_heads // constants["HP"], groups[0].numel())](
        q,
        cells,
        ancestry,
        rows,
        positions,
        *groups,
        out,
        q.stride(0),
        cells.stride(0),
        ancestry.stride(0),
        scale_log2(head_dim),
        **constants,
        AHEAD=ready,
        **overlap(q),
    )


def _launch_cross_groups(
    q: torch.Tensor,
    cross_cells: torch.Tensor,
    source_lengths: torch.Tensor,
    groups: Groups,
    out: torch.Tensor,
    num_heads: int,
    tiles: GroupTiles,
    ready: bool,
) -> None:
    from kernels.decode_attention.grouped import cross_group_kernel

    head_dim = q.shape[1] // num_heads
    constants = group_constants(num_heads, head_dim, tiles)
    cross_group_kernel[(num_heads // constants["HP"], groups[0].numel())](
        q,
        cross_cells,
        source_lengths,
        *groups,
        out,
        q.stride(0),
        cross_cells.stride(0),
        scale_log2(head_dim),
        **constants,
        AHEAD=ready,
        **overlap(q),
    )


def _takes_groups(q: torch.Tensor) -> bool:
    return q.dtype != torch.float32 and q.is_cuda and _is_hopper(q.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


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


def _check_groups(groups: Groups) -> int:
    """G of well-formed groups."""
    num_groups = groups[0].numel()
    for name, index in zip(("group_slots", "group_starts", "group_counts"), groups, strict=True):
        _check_index(name, index, (num_groups,))
    return num_groups


def _output(q: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check(
        out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(),
        f"out is {out.dtype}{tuple(out.shape)}; want contiguous {q.dtype}{tuple(q.shape)}",
    )
    return out
