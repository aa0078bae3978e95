"""Launchers of decode attention. R entries of the batch, N cache rows, T_max target positions, P source slots, G groups,
H heads, Dh head_dim, D = H * Dh.

Two kernels each: `kernel.py` runs everywhere, an entry's or a group's head a program. `grouped.py` is for 16 bits on Hopper:
what costs there is the number of programs (1.25 ns each where there is room for them), so several heads share one, and so do
groups where more may come than as a rule are there; the beams of a sentence share what they read of their histories, from a
list that is made once a step for all layers (`kernels.history_lists`).
"""

from __future__ import annotations

import functools

import torch

from kernels.decode_attention.operands import (
    Groups,
    check_cells,
    check_groups,
    check_index,
    check_lists,
    check_queries,
    output_like,
)
from kernels.decode_attention.tiles import (
    CROSS_GROUP_TILES,
    CROSS_TILES,
    MANY_GROUPS,
    MAX_AHEAD,
    SELF_LIST_TILES,
    SELF_TILES,
    CrossTiles,
    GroupTiles,
    SelfTiles,
    cross_constants,
    group_constants,
    group_programs,
    scale_log2,
    self_constants,
)
from kernels.history_lists import PLACES, HistoryLists
from kernels.launch import check, overlap


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
    lists: HistoryLists | None = None,
    usual_groups: int | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every entry over positions 0..positions[e] of its hypothesis -> out [R, D].

    q fp32/fp16/bf16[R, D], any row stride; cells like q [N, T_max, 2, H, Dh] (key, value); ancestry int32[N, T >= T_max]:
    the cache row that holds position t of the hypothesis living in row n; rows int32[R]: cache row of an entry, -1 for
    an inactive entry (nothing of it is read, zeros are written); positions int32[R]. The entry's own key and value are in
    cells[rows[e], positions[e]], earlier ones in cells[ancestry[rows[e], t], t]. No other cell and no other column of
    ancestry is read. Rows, positions and ancestry within bounds are the caller's duty: they are not looked at here.
    Softmax and sums in fp32. One launch whose time follows positions. Same bits whatever else is in the batch.
    history_ready: the caller knows that no launch still running when this one may start writes lists, or without them rows,
    positions, ancestry, nor earlier cells, but for the cell of position 0 of an entry at position 1 (a sentence's start
    token may be fed in the same step): then these are read before q is waited for (by many entries only with lists). Such a
    launch, like those of `small_linear`, lets the next one start before it waits itself: "still running" reaches back to the
    last launch that waits first (see `kernels.launch`).
    lists: of the same entries, as `step_inputs` fills them: groups of up to 8 that stand at one position and are active or
    inactive together. Cells are then found through them alone, and read once for a group; only for 16 bits on Hopper, and
    of use from `lists_from` entries on. Entries of no group are left unwritten; an entry's bits depend on the histories of
    its own group, and differ from those without lists; a NaN in a cell reaches its whole group.
    usual_groups: see `decode_cross_attention`.
    Raises ValueError for shapes, types or strides that do not fit.
    """
    num_entries, head_dim = check_queries(q, num_heads)
    check_cells("cells", cells, q, num_heads)
    check(
        ancestry.dim() == 2 and ancestry.shape[0] == cells.shape[0] and ancestry.shape[1] >= cells.shape[1],
        f"ancestry is {tuple(ancestry.shape)}; want [{cells.shape[0]}, at least {cells.shape[1]}]",
    )
    check_index("ancestry", ancestry, ancestry.shape)
    check_index("rows", rows, (num_entries,))
    check_index("positions", positions, (num_entries,))
    if lists is not None:
        check_lists(lists, cells)
    check(
        tiles is None or isinstance(tiles, GroupTiles) == (lists is not None),
        "GroupTiles are for lists, SelfTiles for no lists: leave out tiles",
    )
    out = output_like(q, out)
    if num_entries == 0:
        return out
    if lists is not None:
        check(
            head_dim in SELF_LIST_TILES and _takes_groups(q.dtype, q.device),
            f"lists are for 16 bits on Hopper and a head_dim of {list(SELF_LIST_TILES)}: leave them out",
        )
        list_tiles = tiles if isinstance(tiles, GroupTiles) else SELF_LIST_TILES[head_dim]
        check(list_tiles.positions == PLACES, f"lists are padded to {PLACES} places: give tiles of so many positions")
        _launch_self_lists(q, cells, lists, out, num_heads, list_tiles, history_ready, usual_groups)
        return out
    from kernels.decode_attention.kernel import decode_self_attention_kernel

    plain = tiles if isinstance(tiles, SelfTiles) else SELF_TILES[head_dim]
    decode_self_attention_kernel[(num_heads, -(-num_entries // plain.entries))](
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
        **self_constants(num_heads, head_dim, q.dtype, plain),
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
    tiles: CrossTiles | GroupTiles | None = None,
    source_ready: bool = False,
    usual_groups: int | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every entry over the source sentence of its group -> out [R, D].

    q fp32/fp16/bf16[R, D], any row stride; cross_cells like q [P, S_max, 2, H, Dh] (key, value); source_lengths int32[P]
    (cells past it are not read; length 0 gives zeros). Group g is entries group_starts[g] .. + group_counts[g] - 1, all of
    source slot group_slots[g]; all three int32[G]. Slot -1 or count 0: an unused group. Counts up to 8; entries beyond
    are ignored. **Entries of no group are not written**: what `out` held stays (garbage in a fresh one). Indices within
    bounds are the caller's duty. Softmax in fp32. One launch. Same bits whatever the other groups hold.
    source_ready: the caller knows that no launch still running when this one may start writes anything of this but q: then
    first cells are read before q is waited for, and the next launch may start (as with history_ready).
    usual_groups: how many groups are in use as a rule, the first of all G (None: G). There are programs for so many; those
    beyond are worked off by the same programs after their first, and an unused group costs nothing. Changes no bit.
    Raises ValueError for shapes, types or strides that do not fit.
    """
    _, head_dim = check_queries(q, num_heads)
    check_cells("cross_cells", cross_cells, q, num_heads)
    check_index("source_lengths", source_lengths, (cross_cells.shape[0],))
    num_groups = check_groups((group_slots, group_starts, group_counts))
    out = output_like(q, out)
    if num_groups == 0:
        return out
    if tiles is None and head_dim in CROSS_GROUP_TILES and _takes_groups(q.dtype, q.device):
        tiles = CROSS_GROUP_TILES[head_dim][num_groups > MANY_GROUPS]
    if isinstance(tiles, GroupTiles):
        check(_takes_groups(q.dtype, q.device), "GroupTiles are for 16 bits on Hopper: leave out tiles")
        groups = group_slots, group_starts, group_counts
        _launch_cross_groups(q, cross_cells, source_lengths, groups, out, num_heads, tiles, source_ready, usual_groups)
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


def lists_from(num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The least number of entries whose self-attention gains by lists; None where no kernel takes them."""
    if head_dim not in SELF_LIST_TILES or not _takes_groups(dtype, device):
        return None
    return MAX_AHEAD // num_heads + 1


def _launch_self_lists(
    q: torch.Tensor,
    cells: torch.Tensor,
    lists: HistoryLists,
    out: torch.Tensor,
    num_heads: int,
    tiles: GroupTiles,
    ready: bool,
    usual_groups: int | None,
) -> None:
    from kernels.decode_attention.grouped import self_list_kernel

    head_dim = q.shape[1] // num_heads
    programs, _ = group_programs(lists.groups.shape[0], usual_groups)
    constants = group_constants(num_heads, head_dim, tiles)
    self_list_kernel[(num_heads // constants["HP"], programs)](
        q,
        cells,
        lists.groups,
        lists.words,
        lists.in_use,
        out,
        q.stride(0),
        lists.words.shape[1],
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
    usual_groups: int | None,
) -> None:
    from kernels.decode_attention.grouped import cross_group_kernel

    head_dim = q.shape[1] // num_heads
    num_groups = groups[0].numel()
    programs, turns = group_programs(num_groups, usual_groups)
    constants = group_constants(num_heads, head_dim, tiles)
    cross_group_kernel[(num_heads // constants["HP"], programs)](
        q,
        cross_cells,
        source_lengths,
        *groups,
        out,
        q.stride(0),
        cross_cells.stride(0),
        scale_log2(head_dim),
        num_groups,
        TURNS=turns,
        **constants,
        AHEAD=ready,
        **overlap(q),
    )


def _takes_groups(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype != torch.float32 and device.type == "cuda" and _is_hopper(device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
