"""Self-attention of a decode step: cases, operands, and one run of either side.

Operands are NaN (indices far out of range) wherever nothing may be read, and so is the output before the call.
"""

from __future__ import annotations

import dataclasses

import torch

from kernels.decode_attention import decode_self_attention, decode_self_attention_reference
from kernels.decode_attention.tiles import GroupTiles, SelfTiles
from kernels.history_lists import PLACES, SEEN_BY, HistoryLists, history_lists_reference

_NAN, _BEYOND = float("nan"), 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class SelfCase:
    """Entries by the number of positions they attend over (0: inactive), in sentences of `beam` neighbours."""

    num_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    beam: int = 1
    max_positions: int = 0  # T_max; 0: the longest length

    @property
    def name(self) -> str:
        """Readable id."""
        return f"h{self.num_heads}x{self.head_dim}-t{'.'.join(map(str, self.lengths))}-beam{self.beam}-{self.max_positions}"


@dataclasses.dataclass(frozen=True, slots=True)
class GroupCase:
    """Sentences by their number of entries (0: unused; negative: so many inactive ones), the position that these stand at,
    and how many earlier positions all of them share."""

    num_heads: int
    head_dim: int
    counts: tuple[int, ...]
    positions: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def name(self) -> str:
        """Readable id."""
        groups = ".".join(f"{c}x{t}s{s}" for c, t, s in zip(self.counts, self.positions, self.shared, strict=True))
        return f"h{self.num_heads}x{self.head_dim}-{groups}"


def self_cases(*, large: bool) -> list[SelfCase]:
    """Awkward sizes for every head_dim; `large` (GPU) adds sizes that an interpreter is too slow for."""
    cases = [
        SelfCase(1, 16, (1,)),
        SelfCase(3, 32, (5, 0, 17, 64, 33)),
        SelfCase(2, 64, (9, 9, 9, 9, 37, 37, 37, 37, 1), beam=4, max_positions=40),
        SelfCase(1, 128, (16, 15, 0, 0, 0, 0, 0, 20), beam=2),
        SelfCase(2, 16, (0, 0, 0), max_positions=3),
    ]
    if large:
        cases += [
            SelfCase(16, 64, tuple(1 + i // 4 * 13 % 64 for i in range(320)), beam=4, max_positions=64),
            SelfCase(16, 128, (512, 0, 300, 1), beam=4),
            SelfCase(4, 64, (1024, 1023, 1), max_positions=1024),
            SelfCase(16, 32, (100,) * 7),
        ]
    return cases


def group_cases(*, large: bool) -> list[GroupCase]:
    """See `self_cases`. One of the sizes at a border of everything: no history, all of it shared, none of it, more than a
    warp's worth of shared positions, groups of a number of entries that is no power of two."""
    cases = [
        GroupCase(1, 64, (1, 4, 0, 3), (0, 9, 0, 20), (0, 5, 0, 0)),
        GroupCase(2, 64, (8, -2, 2, 5), (40, 7, 1, 33), (39, 3, 1, 32)),
    ]
    if large:
        cases += [
            GroupCase(
                16,
                64,
                (4,) * 80 + (0,) * 240,
                tuple(i % 34 for i in range(320)),
                tuple(max(0, i % 34 - 5) for i in range(320)),
            ),
            GroupCase(16, 64, (1,) * 100, tuple(7 * i % 66 for i in range(100)), (0,) * 100),
            GroupCase(4, 64, (6, 8, 7, -3, 4), (1000, 200, 64, 9, 15), (900, 0, 63, 2, 15)),
            GroupCase(16, 64, (4, 1, 8) * 12, (1,) * 36, (1, 0, 0) * 12),
            GroupCase(16, 128, (4, 8, 1, 0, 3), (30, 1, 70, 0, 16), (25, 1, 0, 0, 16)),
        ]
    return cases


@dataclasses.dataclass(frozen=True, slots=True)
class SelfInputs:
    """Operands of one case of decode_self_attention."""

    q: torch.Tensor
    cells: torch.Tensor
    ancestry: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    num_heads: int
    ready: bool = False
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    tiles: SelfTiles | GroupTiles | None = None
    lists: HistoryLists | None = None
    usual_groups: int | None = None

    def listed(self) -> SelfInputs:
        """The same with the lists of its groups, for the kernel that takes them; behind their ends they name a NaN cell."""
        assert self.groups is not None
        operands = *self.groups, self.rows, self.positions, self.ancestry
        lists = history_lists_reference(*operands, max_positions=self.cells.shape[1])
        ends = (lists.groups[:, 2:3] + PLACES - 1) // PLACES * PLACES
        unlisted = torch.arange(lists.words.shape[1], device=ends.device) >= ends.clamp(min=1)
        poison = self.cells[:, :, 0, 0, 0].isnan().flatten().nonzero()[0].int() - (1 << SEEN_BY)  # seen by all
        lists.words.copy_(torch.where(unlisted, poison, lists.words))
        return dataclasses.replace(self, lists=lists)

    def run(self) -> torch.Tensor:
        """The op over a poisoned output; with groups, NaN for entries of none, whatever is there."""
        operands, out = (self.q, self.cells, self.ancestry, self.rows, self.positions), self.q.new_full(self.q.shape, _NAN)
        return self._grouped(
            decode_self_attention(
                *operands,
                num_heads=self.num_heads,
                out=out,
                tiles=self.tiles,
                history_ready=self.ready,
                lists=self.lists,
                usual_groups=self.usual_groups,
            )
        )

    def truth(self) -> torch.Tensor:
        """The slow twin."""
        operands = self.q, self.cells, self.ancestry, self.rows, self.positions
        return self._grouped(decode_self_attention_reference(*operands, num_heads=self.num_heads))

    def _grouped(self, out: torch.Tensor) -> torch.Tensor:
        if self.groups is None:
            return out
        inside = torch.zeros(len(out), dtype=torch.bool)
        for slot, start, count in zip(*(t.tolist() for t in self.groups), strict=True):
            inside[start : start + (count if slot >= 0 else 0)] = True
        return torch.where(inside.to(out.device)[:, None], out, _NAN)


def self_inputs(case: SelfCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> SelfInputs:
    """Random operands. Every earlier position of an entry is held by a random beam mate's cache row; cache rows are a
    random choice, with spare ones between them."""
    generator = torch.Generator().manual_seed(seed)
    count, d_model = len(case.lengths), case.num_heads * case.head_dim
    max_positions = case.max_positions or max(case.lengths)
    num_rows = count + 3
    rows = torch.randperm(num_rows, generator=generator)[:count].int()
    ancestry = torch.full((num_rows, max_positions + 1), _BEYOND, dtype=torch.int32)
    cells = torch.full((num_rows, max_positions, 2, case.num_heads, case.head_dim), _NAN)
    q = torch.full((count, 3 * d_model), _NAN)
    for entry, length in enumerate(case.lengths):
        if length == 0:
            continue
        row = int(rows[entry])
        first = entry // case.beam * case.beam
        mates = rows[first : first + case.beam]
        held_by = mates[torch.randint(len(mates), (length - 1,), generator=generator)]
        ancestry[row, : length - 1] = held_by
        read = torch.cat((held_by, rows[entry : entry + 1])).long(), torch.arange(length)
        cells[read] = torch.where(cells[read].isnan(), torch.randn(cells[read].shape, generator=generator), cells[read])
        q[entry, :d_model] = torch.randn(d_model, generator=generator) * 2
    active = torch.tensor(case.lengths) > 0
    positions = torch.where(active, torch.tensor(case.lengths) - 1, _BEYOND).int()
    rows = torch.where(active, rows, -1)
    q, cells = q.to(device, dtype)[:, :d_model], cells.to(device, dtype)
    return SelfInputs(q, cells, ancestry.to(device), rows.to(device), positions.to(device), case.num_heads)


def group_inputs(case: GroupCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> SelfInputs:
    """Random operands. A position that all entries of a group share is held by one of their cache rows, any other by any of
    them; groups lie in random order, an entry of no group follows each, and unused groups have nothing that may be read."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(case.counts)
    sizes, d_model, longest = counts.abs(), case.num_heads * case.head_dim, max(case.positions) + 1
    order = torch.randperm(len(sizes), generator=generator)
    starts = torch.empty_like(order)
    starts[order] = (sizes[order] + 1).cumsum(0) - sizes[order] - 1
    num_entries = int((sizes + 1).sum())
    rows = torch.full((num_entries,), -1)
    positions = torch.full((num_entries,), _BEYOND)
    free = torch.randperm(num_entries, generator=generator)
    ancestry = torch.full((num_entries, longest + 1), _BEYOND)
    cells = torch.full((num_entries, longest, 2, case.num_heads, case.head_dim), _NAN)
    q = torch.full((num_entries, d_model + 16), _NAN)
    for start, count, last, shared in zip(starts.tolist(), case.counts, case.positions, case.shared, strict=True):
        if count <= 0:
            continue
        here, mine = slice(start, start + count), free[start : start + count]
        rows[here], positions[here] = mine, last
        held = mine[torch.randint(count, (count, last), generator=generator)]
        held[:, :shared] = held[:1, :shared]
        ancestry[mine, :last] = held
        read = torch.cat((held, mine[:, None]), 1), torch.arange(last + 1).expand(count, -1)
        cells[read] = torch.randn(cells[read].shape, generator=generator)
        q[here, :d_model] = torch.randn(count, d_model, generator=generator) * 2
    used = torch.where(counts == 0, -1, torch.arange(len(sizes)))
    starts = torch.where(counts == 0, _BEYOND, starts)
    q, cells = q.to(device, dtype)[:, :d_model], cells.to(device, dtype)
    ancestry, rows, positions, used, starts, sizes = (
        t.int().to(device) for t in (ancestry, rows, positions, used, starts, sizes)
    )
    return SelfInputs(q, cells, ancestry, rows, positions, case.num_heads, groups=(used, starts, sizes))
