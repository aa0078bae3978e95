"""Every attention op against its slow twin, one case at a time (see `kernels.checks`).

Operands are NaN (indices far out of range) wherever nothing may be read, and so is the output before the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from kernels.decode_attention import (
    decode_cross_attention,
    decode_cross_attention_reference,
    decode_self_attention,
    decode_self_attention_reference,
)
from kernels.decode_attention.tiles import (
    CROSS_GROUP_TILES,
    CROSS_TILES,
    SELF_GROUP_TILES,
    CrossTiles,
    GroupTiles,
    SelfTiles,
)
from kernels.encoder_attention import encoder_attention, encoder_attention_reference
from kernels.testing import relative_error

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
class CrossCase:
    """Groups by their number of entries (0: unused) and the length of their source."""

    num_heads: int
    head_dim: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Readable id."""
        groups = ".".join(f"{c}x{s}" for c, s in zip(self.counts, self.lengths, strict=True))
        return f"h{self.num_heads}x{self.head_dim}-{groups}"


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


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderCase:
    """Sentences by their length; a negative length is a gap of so many padding tokens."""

    num_heads: int
    head_dim: int
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Readable id."""
        return f"h{self.num_heads}x{self.head_dim}-s{'.'.join(map(str, self.lengths))}"


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


def cross_cases(*, large: bool) -> list[CrossCase]:
    """See `self_cases`."""
    cases = [
        CrossCase(1, 16, (1,), (1,)),
        CrossCase(3, 32, (4, 0, 8, 1, 4), (24, 10, 33, 65, 32)),
        CrossCase(2, 64, (3, 5), (31, 70)),
        CrossCase(1, 128, (2, 4, 0), (40, 0, 0)),
    ]
    if large:
        cases += [
            CrossCase(16, 64, (4,) * 80, tuple(1 + 7 * i % 48 for i in range(80))),
            CrossCase(16, 64, (4, 1, 0) * 60, tuple(1 + 5 * i % 70 for i in range(180))),
            CrossCase(16, 128, (5, 8, 1, 0, 7), (1024, 512, 3, 9, 200)),
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


def encoder_cases(*, large: bool) -> list[EncoderCase]:
    """See `self_cases`."""
    cases = [
        EncoderCase(1, 16, (1,)),
        EncoderCase(2, 32, (24, 7, 1, 50, -5)),
        EncoderCase(1, 64, (3, -2, 70, 1, -3, 2, -1)),
        EncoderCase(1, 128, (33, 40)),
        EncoderCase(2, 16, (-9,)),
    ]
    if large:
        cases += [
            EncoderCase(16, 64, (*(1 + 11 * i % 61 for i in range(60)), -37)),
            EncoderCase(16, 128, (512, 3, 700)),
            EncoderCase(4, 64, (1024, -8, 1024, 1)),
            EncoderCase(16, 32, (5,) * 100),
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

    def run(self) -> torch.Tensor:
        """The op over a poisoned output; with groups, NaN for entries of none, whatever is there."""
        operands, out = (self.q, self.cells, self.ancestry, self.rows, self.positions), _poisoned(self.q)
        return self._grouped(
            decode_self_attention(
                *operands,
                num_heads=self.num_heads,
                out=out,
                tiles=self.tiles,
                history_ready=self.ready,
                groups=self.groups,
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


@dataclasses.dataclass(frozen=True, slots=True)
class CrossInputs:
    """Operands of one case of decode_cross_attention."""

    q: torch.Tensor
    cells: torch.Tensor
    source_lengths: torch.Tensor
    group_slots: torch.Tensor
    group_starts: torch.Tensor
    group_counts: torch.Tensor
    num_heads: int
    ready: bool = False
    tiles: CrossTiles | GroupTiles | None = None

    def run(self) -> torch.Tensor:
        """The op over a poisoned output."""
        operands = self.q, self.cells, self.source_lengths, self.group_slots, self.group_starts, self.group_counts
        out = _poisoned(self.q)
        return decode_cross_attention(
            *operands, num_heads=self.num_heads, out=out, tiles=self.tiles, source_ready=self.ready
        )

    def truth(self) -> torch.Tensor:
        """The slow twin."""
        operands = self.q, self.cells, self.source_lengths, self.group_slots, self.group_starts, self.group_counts
        return decode_cross_attention_reference(*operands, num_heads=self.num_heads)


def cross_inputs(case: CrossCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> CrossInputs:
    """Random operands. Slots are a random choice, groups lie in random order, and an entry of no group follows each."""
    generator = torch.Generator().manual_seed(seed)
    num_groups, d_model = len(case.counts), case.num_heads * case.head_dim
    counts, lengths = torch.tensor(case.counts), torch.tensor(case.lengths)
    slots = torch.randperm(num_groups + 2, generator=generator)[:num_groups]
    order = torch.randperm(num_groups, generator=generator)
    starts = torch.empty_like(order)
    starts[order] = (counts[order] + 1).cumsum(0) - counts[order] - 1
    num_entries = int((counts + 1).sum())
    source_lengths = torch.full((num_groups + 2,), _BEYOND)
    source_lengths[slots] = lengths
    cells = torch.full((num_groups + 2, max(case.lengths) + 1, 2, case.num_heads, case.head_dim), _NAN)
    q = torch.full((num_entries, d_model + 16), _NAN)
    for slot, start, count, length in zip(slots.tolist(), starts.tolist(), case.counts, case.lengths, strict=True):
        cells[slot, :length] = torch.randn(cells[slot, :length].shape, generator=generator)
        q[start : start + count, :d_model] = torch.randn(count, d_model, generator=generator) * 2
    unused = counts == 0
    slots[unused & (torch.arange(num_groups) % 2 == 0)] = -1  # the others are unused by their count alone
    counts[slots < 0] = 7
    q, cells = q.to(device, dtype)[:, :d_model], cells.to(device, dtype)
    source_lengths, slots, starts, counts = (t.int().to(device) for t in (source_lengths, slots, starts, counts))
    return CrossInputs(q, cells, source_lengths, slots, starts, counts, case.num_heads)


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderInputs:
    """Operands of one case of encoder_attention."""

    qkv: torch.Tensor
    token_starts: torch.Tensor
    token_ends: torch.Tensor
    num_heads: int

    def run(self) -> torch.Tensor:
        """The op over a poisoned output."""
        out = _poisoned(self.qkv[:, : self.qkv.shape[1] // 3])
        return encoder_attention(self.qkv, self.token_starts, self.token_ends, num_heads=self.num_heads, out=out)

    def truth(self) -> torch.Tensor:
        """The slow twin."""
        return encoder_attention_reference(self.qkv, self.token_starts, self.token_ends, num_heads=self.num_heads)


def encoder_inputs(case: EncoderCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> EncoderInputs:
    """Random operands; a padding token has an empty range: at the next sentence's start or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, width = sum(map(abs, case.lengths)), 3 * case.num_heads * case.head_dim
    qkv = torch.full((num_tokens, width), _NAN)
    starts = torch.randint(0, num_tokens, (num_tokens,), generator=generator, dtype=torch.int32)
    ends = starts.clone()
    at = 0
    for length in case.lengths:
        if length > 0:
            qkv[at : at + length] = torch.randn(length, width, generator=generator) * 1.5
            starts[at : at + length], ends[at : at + length] = at, at + length
        else:
            every_other = slice(at + (1 - length) % 2, at - length, 2)  # the last one among them
            starts[every_other] = ends[every_other] = at - length
        at += abs(length)
    return EncoderInputs(qkv.to(device, dtype), starts.to(device), ends.to(device), case.num_heads)


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full(like.shape, _NAN, dtype=like.dtype, device=like.device)


Inputs = SelfInputs | CrossInputs | EncoderInputs


def check_inputs(inputs: Inputs) -> float:
    """Error of what must be written, the largest of all kernels that may be asked for it; inf when a row that must stay or
    be zero does not, or two runs on a GPU differ."""
    return max(_error(one) for one in every_kernel(inputs))


def every_kernel(inputs: Inputs) -> list[Inputs]:
    """The inputs as they are, and with the tiles of every other kernel that this device has for them."""
    found = [inputs]
    if isinstance(inputs, EncoderInputs) or not inputs.q.is_cuda:
        return found
    head_dim = inputs.q.shape[1] // inputs.num_heads
    hopper = torch.cuda.get_device_capability(inputs.q.device) == (9, 0) and inputs.q.dtype != torch.float32
    if isinstance(inputs, CrossInputs):
        tiles = CROSS_GROUP_TILES.get(head_dim, ()) if hopper else ()
        return [inputs, *(dataclasses.replace(inputs, tiles=t) for t in (CROSS_TILES[head_dim], *tiles))]
    if hopper and inputs.groups is not None and head_dim in SELF_GROUP_TILES:
        found += [dataclasses.replace(inputs, tiles=SELF_GROUP_TILES[head_dim])]
    return found


def _error(inputs: Inputs) -> float:
    out, truth = inputs.run(), inputs.truth()
    if out.is_cuda:  # the second run reads cells before it waits
        again = inputs if isinstance(inputs, EncoderInputs) else dataclasses.replace(inputs, ready=True)
        if not torch.equal(out.nan_to_num(7.0), again.run().nan_to_num(7.0)):
            return float("inf")
    unwritten, zero = truth.isnan().all(1), truth.eq(0).all(1)
    if not out[unwritten].isnan().all() or not out[zero].eq(0).all():
        return float("inf")
    return relative_error(out[~unwritten], truth[~unwritten])


def make_inputs(case: SelfCase | GroupCase | CrossCase | EncoderCase, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Operands of any case."""
    if isinstance(case, SelfCase):
        return self_inputs(case, device, dtype)
    if isinstance(case, GroupCase):
        return group_inputs(case, device, dtype)
    if isinstance(case, CrossCase):
        return cross_inputs(case, device, dtype)
    return encoder_inputs(case, device, dtype)


def attention_failures(device: torch.device, dtype: torch.dtype, limit: float, *, large: bool) -> Iterator[str]:
    """One line for each case of each op whose error is not within the limit."""
    cases: list[SelfCase | GroupCase | CrossCase | EncoderCase] = [*self_cases(large=large), *group_cases(large=large)]
    cases += [*cross_cases(large=large), *encoder_cases(large=large)]
    for case in cases:
        error = check_inputs(make_inputs(case, device, dtype))
        if not error <= limit:
            yield f"{type(case).__name__.removesuffix('Case')} attention {dtype} {case.name}: error {error:.2e}"
