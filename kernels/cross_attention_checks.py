"""Cross-attention of a decode step: cases, operands, and one run of either side.

Operands are NaN (indices far out of range) wherever nothing may be read, and so is the output before the call.
"""

from __future__ import annotations

import dataclasses

import torch

from kernels.decode_attention import decode_cross_attention, decode_cross_attention_reference
from kernels.decode_attention.tiles import CrossTiles, GroupTiles

_NAN, _BEYOND = float("nan"), 2**30


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


def cross_cases(*, large: bool) -> list[CrossCase]:
    """Awkward sizes for every head_dim; `large` (GPU) adds sizes that an interpreter is too slow for."""
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
    usual_groups: int | None = None

    def run(self) -> torch.Tensor:
        """The op over a poisoned output."""
        operands = self.q, self.cells, self.source_lengths, self.group_slots, self.group_starts, self.group_counts
        out = self.q.new_full(self.q.shape, _NAN)
        return decode_cross_attention(
            *operands,
            num_heads=self.num_heads,
            out=out,
            tiles=self.tiles,
            source_ready=self.ready,
            usual_groups=self.usual_groups,
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
