"""The benchmark of the attention ops: data, check against the reference, timing, torch beside it (see `kernels.bench`).

Every call of a replay has its own keys and values, together larger than L2: in a step the weights of all layers pass
between two uses of a cell. Queries are shared, for they come straight from the projection before. As in the engine there are
as many groups as entries, the unused ones at the end.
R entries, T target positions, S source length, G groups, H heads, Dh head_dim, D = H * Dh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn import functional

from kernels.bench_rows import Machine, Row
from kernels.decode_attention import (
    decode_cross_attention,
    decode_cross_attention_reference,
    decode_self_attention,
    decode_self_attention_reference,
    lists_from,
)
from kernels.decode_attention.tiles import CrossTiles, GroupTiles, SelfTiles
from kernels.encoder_attention import encoder_attention, encoder_attention_reference
from kernels.encoder_attention.launcher import HALF_TILES, Tiles
from kernels.history_lists import HistoryLists, history_lists_reference
from kernels.testing import graph_time_us, relative_error

_HEADS, _BEAM, _LIMIT = 16, 4, 5e-3
_COLD_BYTES = 128 << 20
_OWN = 5  # the last positions that the beams of a sentence do not share yet


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def _index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _num_calls(touched: int) -> int:
    return max(6, min(1024, -(-_COLD_BYTES // touched)))


def decode_self_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """One entry and 80 sentences of four beams, at 32 and 64 positions (and more of both)."""
    del machine
    yield from (_self_row(64, entries, length, {}) for entries in (1, 320) for length in (32, 64))
    if not quick:
        points = ((64, 64, 48), (64, 1, 512), (64, 16, 512), (128, 1, 32), (128, 320, 32), (128, 320, 64))
        yield from (_self_row(*point, {}) for point in points)


def _groups(entries: int, beam: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    used, unused = entries // beam, entries - entries // beam
    starts, counts = [*range(0, entries, beam), *[0] * unused], [beam] * used + [0] * unused
    return _index([*range(used), *[-1] * unused]), _index(starts), _index(counts)


def _self_row(head_dim: int, entries: int, length: int, tiles: dict[str, SelfTiles | GroupTiles]) -> Row:
    """One row; with named `tiles` their times stand beside the default's instead of torch's."""
    beam, d_model = min(entries, _BEAM), _HEADS * head_dim
    shared = max(0, length - _OWN) if beam > 1 else length
    cell_bytes = 2 * d_model * 2
    touched = entries // beam * (shared + beam * (length - shared)) * cell_bytes + 2 * entries * d_model * 2
    calls = _num_calls(touched)
    cells = _draw(calls * entries, length, 2, _HEADS, head_dim)
    number = torch.arange(calls * entries, device="cuda", dtype=torch.int32)
    ancestry = number[:, None].repeat(1, length + 1)
    ancestry[:, :shared] = (number // beam * beam)[:, None]
    rows, positions = number.view(calls, entries), _index([length - 1] * entries)
    q, out, groups = _draw(entries, d_model), _draw(entries, d_model), _groups(entries, beam)
    least = lists_from(_HEADS, head_dim, q.dtype, q.device)

    @functools.cache
    def lists(index: int) -> HistoryLists:
        return history_lists_reference(*groups, rows[index], positions, ancestry, max_positions=length)

    def ours(index: int, tile: SelfTiles | GroupTiles | None = None) -> torch.Tensor:
        listed = isinstance(tile, GroupTiles) or (tile is None and least is not None and entries >= least)
        return decode_self_attention(
            q,
            cells,
            ancestry,
            rows[index],
            positions,
            num_heads=_HEADS,
            out=out,
            tiles=tile,
            lists=lists(index) if listed else None,
            usual_groups=entries // beam,
        )

    flat, query = cells.view(calls * entries * length, -1), q.view(entries, _HEADS, 1, head_dim)
    read = (ancestry[:, :length].long() * length + torch.arange(length, device="cuda")).view(calls, -1)

    def eager(index: int) -> torch.Tensor:
        history = flat.index_select(0, read[index]).view(entries, length, 2, _HEADS, head_dim)
        key, value = history.permute(2, 0, 3, 1, 4).unbind(0)
        return functional.scaled_dot_product_attention(query, key, value)

    truth = decode_self_attention_reference(q, cells, ancestry, rows[0], positions, num_heads=_HEADS)
    case = f"H={_HEADS} Dh={head_dim} R={entries} T={length}"
    return _row("decode_self", case, ours, eager, truth, calls, touched, 4.0 * entries * length * d_model, tiles)


def decode_cross_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """One sentence and 80, four beams each, sources of 24 tokens (and longer ones)."""
    del machine
    yield from (_cross_row(64, groups, 24, {}) for groups in (1, 80))
    if not quick:
        points = ((64, 80, 48), (64, 1, 512), (64, 16, 512), (128, 1, 24), (128, 80, 24))
        yield from (_cross_row(*point, {}) for point in points)


def _cross_row(head_dim: int, groups: int, length: int, tiles: dict[str, CrossTiles | GroupTiles]) -> Row:
    entries, d_model = groups * _BEAM, _HEADS * head_dim
    touched = groups * length * 2 * d_model * 2 + 2 * entries * d_model * 2
    calls = _num_calls(touched)
    slot_length = length + 8
    cells = _draw(calls * groups, slot_length, 2, _HEADS, head_dim)
    lengths = _index([length] * (calls * groups))
    slots, starts, counts = _groups(entries, _BEAM)
    places = torch.arange(calls, device="cuda", dtype=torch.int32)[:, None] * groups
    slots = torch.where(counts > 0, slots + places, -1)
    q, out = _draw(entries, d_model), _draw(entries, d_model)

    def ours(index: int, tile: CrossTiles | GroupTiles | None = None) -> torch.Tensor:
        operands = q, cells, lengths, slots[index], starts, counts
        return decode_cross_attention(*operands, num_heads=_HEADS, out=out, tiles=tile)

    query = q.view(groups, _BEAM, _HEADS, head_dim).transpose(1, 2)

    def eager(index: int) -> torch.Tensor:
        source = cells[index * groups : (index + 1) * groups, :length]  # neighbouring slots of one length: no gather
        key, value = source.permute(2, 0, 3, 1, 4).unbind(0)
        return functional.scaled_dot_product_attention(query, key, value)

    truth = decode_cross_attention_reference(q, cells, lengths, slots[0], starts, counts, num_heads=_HEADS)
    case = f"H={_HEADS} Dh={head_dim} G={groups}x{_BEAM} S={length}"
    return _row("decode_cross", case, ours, eager, truth, calls, touched, 4.0 * entries * length * d_model, tiles)


def encoder_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Packs of equally long sentences, so that torch needs no mask."""
    del machine
    yield from (_encoder_row(64, count, length, {}) for count, length in ((1, 24), (16, 24), (170, 24), (8, 512)))
    if not quick:
        points = ((64, 64, 64), (64, 4, 1024), (64, 32, 512), (128, 170, 24), (128, 8, 512))
        yield from (_encoder_row(*point, {}) for point in points)


def _encoder_row(head_dim: int, count: int, length: int, tiles: dict[str, Tiles]) -> Row:
    tokens, d_model = count * length, _HEADS * head_dim
    touched = 4 * tokens * d_model * 2
    calls = min(64, _num_calls(touched))  # hot: these come straight from the projection
    packs, out = [_draw(tokens, 3 * d_model) for _ in range(calls)], _draw(tokens, d_model)
    starts = torch.arange(count, device="cuda", dtype=torch.int32).repeat_interleave(length) * length
    ends = starts + length

    def ours(index: int, tile: Tiles | None = None) -> torch.Tensor:
        return encoder_attention(packs[index], starts, ends, num_heads=_HEADS, out=out, tiles=tile)

    def eager(index: int) -> torch.Tensor:
        packed = packs[index].view(count, length, 3, _HEADS, head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return functional.scaled_dot_product_attention(query, key, value)

    truth = encoder_attention_reference(packs[0], starts, ends, num_heads=_HEADS)
    case = f"H={_HEADS} Dh={head_dim} S={count}x{length}"
    return _row("encoder_attention", case, ours, eager, truth, calls, touched, 4.0 * tokens * length * d_model, tiles)


def _row(
    op: str,
    case: str,
    ours: Callable[..., torch.Tensor],
    eager: Callable[[int], torch.Tensor],
    truth: torch.Tensor,
    calls: int,
    touched: int,
    flops: float,
    tiles: Mapping[str, SelfTiles | CrossTiles | GroupTiles | Tiles],
) -> Row:
    """Check the first call (and every tile's), then time."""
    error = relative_error(ours(0), truth)
    for tile in tiles.values():
        error = max(error, relative_error(ours(0, tile), truth))
    us, anchors = 0.0, {}
    if error <= _LIMIT:
        us = graph_time_us([functools.partial(ours, i) for i in range(calls)])
        for name, tile in tiles.items():
            anchors[name] = graph_time_us([functools.partial(ours, i, tile) for i in range(calls)])
        if not tiles:
            anchors["torch"] = graph_time_us([functools.partial(eager, i) for i in range(calls)])
    return Row(op, case, us, error, _LIMIT, touched, flops, anchors_us=anchors)


SELF_CANDIDATES = {
    64: [(4, 1, 4), (4, 1, 2), (2, 1, 4), (2, 1, 2), (1, 1, 8), (1, 1, 4), (1, 2, 4), (2, 2, 2), (1, 4, 2), (1, 4, 4)],
    128: [(4, 1, 4), (4, 1, 2), (2, 1, 8), (2, 1, 4), (1, 1, 8), (1, 1, 4), (1, 2, 4), (1, 2, 2), (1, 4, 2), (1, 4, 4)],
}
CROSS_CANDIDATES = {
    64: [(16, 1, 3), (16, 2, 3), (32, 1, 3), (32, 2, 3), (32, 4, 3), (32, 4, 2), (64, 4, 3), (64, 8, 3)],
    128: [(16, 2, 3), (32, 2, 3), (32, 4, 3), (64, 4, 2), (64, 8, 2)],
}
SELF_LIST_CANDIDATES = [(1, 16), (2, 16), (2, 16, 112), (2, 16, 160), (4, 16), (4, 16, 104)]
CROSS_GROUP_CANDIDATES = [(1, 32), (2, 32), (4, 32), (8, 32), (8, 32, 128), (4, 16), (8, 16)]
ENCODER_CANDIDATES = {
    64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 2, 3)],
    128: [(64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 3)],
}


def tile_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Other tiles beside the defaults, whose tables are in the launchers."""
    del machine
    for head_dim in (64,) if quick else (64, 128):
        own: dict[str, SelfTiles | GroupTiles] = {_name(t): SelfTiles(*t) for t in SELF_CANDIDATES[head_dim]}
        cross: dict[str, CrossTiles | GroupTiles] = {_name(t): CrossTiles(*t) for t in CROSS_CANDIDATES[head_dim]}
        if torch.cuda.get_device_capability() == (9, 0):
            own |= {f"lists {_name(t)}": GroupTiles(*t) for t in SELF_LIST_CANDIDATES}
            cross |= {f"groups {_name(t)}": GroupTiles(*t) for t in CROSS_GROUP_CANDIDATES}
        yield from (
            _self_row(head_dim, *point, own) for point in ((1, 32), (1, 64), (1, 512), (320, 16), (320, 32), (320, 64))
        )
        yield from (_cross_row(head_dim, *point, cross) for point in ((1, 24), (80, 24), (80, 48), (1, 512)))
        pack = {_name(t): Tiles(*t) for t in ENCODER_CANDIDATES[head_dim] if t != HALF_TILES[head_dim]}
        yield from (_encoder_row(head_dim, *point, pack) for point in ((1, 24), (16, 24), (170, 24), (8, 512)))


def _name(tile: tuple[int, ...]) -> str:
    return "/".join(map(str, tile))
