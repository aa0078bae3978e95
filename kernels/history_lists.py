"""Which cells the histories of a step's sentences hold: listed once by the launch that feeds the step (`step_inputs`), read
by the self-attention of every decoder layer, which would else find each cell by row, position and ancestry again.

G groups (runs of up to 8 entries of one sentence), N cache rows, T_max positions of a cache row, W words a group. A *place*
is a cell that some entry of the group attends to: first the positions whose cells all its entries share, one place each,
then the others by position, and at each by entry: a power of two of places, those of no entry seen by none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check, next_power_of_two

PLACES = 16  # a list is padded to so many: what attention multiplies at once
BLOCKS_AHEAD = 2  # so many times PLACES behind the first are asked for before they are known to be there
SEEN_BY = 24  # bits of a cell number; from here on a word says which of the 8 entries attend to the cell
GROUP_FIELDS = 4  # first entry, entries, places, places that hold no cell which this step writes


@dataclass(frozen=True, slots=True)
class HistoryLists:
    """groups int32[G, 4] (fields above); words int32[G, W]: cell number (row * T_max + position) below bit 24, entries that
    see it from there on; in_use int32[1]: one more than the last group in use. Buffers of the largest step: each fills the
    first of its groups, and `in_use` keeps readers from what an earlier, larger one has left behind them.
    """

    groups: torch.Tensor
    words: torch.Tensor
    in_use: torch.Tensor
    max_positions: int

    @classmethod
    def allocate(cls, max_groups: int, *, num_rows: int, max_positions: int, device: torch.device) -> HistoryLists:
        """Of no group yet. Raises ValueError for more cells than a word can number, or more words than 32 bits can."""
        check(
            num_rows * max_positions < 1 << SEEN_BY,
            f"{num_rows} cache rows of {max_positions} positions are more cells than {SEEN_BY} bits number: lower one",
        )
        width = -(-8 * max_positions // PLACES) * PLACES + BLOCKS_AHEAD * PLACES
        check(max_groups * width < 1 << 31, f"{max_groups} lists of {width} words are too many: use fewer cache rows")
        return cls(
            groups=torch.zeros((max_groups, GROUP_FIELDS), dtype=torch.int32, device=device),
            words=torch.zeros((max_groups, width), dtype=torch.int32, device=device),
            in_use=torch.zeros(1, dtype=torch.int32, device=device),
            max_positions=max_positions,
        )

    def first(self, num_groups: int) -> HistoryLists:
        """The same buffers, as a step of so many groups uses them."""
        return HistoryLists(self.groups[:num_groups], self.words[:num_groups], self.in_use, self.max_positions)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in (self.groups, self.words, self.in_use))


def history_lists_reference(
    group_slots: torch.Tensor,
    group_starts: torch.Tensor,
    group_counts: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    ancestry: torch.Tensor,
    *,
    max_positions: int,
) -> HistoryLists:
    """The lists of these entries, made on the host one cell after the other. Arguments as of `decode_self_attention`; all
    entries of a group stand at one position and are active (row >= 0) or inactive together."""
    num_groups = len(group_slots)
    lists = HistoryLists.allocate(
        num_groups, num_rows=len(ancestry), max_positions=max_positions, device=torch.device("cpu")
    )
    row_of, position_of, holders = rows.tolist(), positions.tolist(), ancestry.cpu()
    for group, (slot, start, count) in enumerate(
        zip(group_slots.tolist(), group_starts.tolist(), group_counts.tolist(), strict=True)
    ):
        entries = min(count, 8) if slot >= 0 else 0
        words, known = list[int](), 0
        if entries > 0:
            lists.in_use[0] = group + 1
        if entries > 0 and row_of[start] >= 0:
            last, mine = position_of[start], row_of[start : start + entries]
            words, known = _listed([[*holders[row, :last].tolist(), row] for row in mine], max_positions)
        lists.groups[group] = torch.tensor([start, entries, len(words), known], dtype=torch.int32)
        padded = words + [_filler(words)] * (-len(words) % PLACES)
        lists.words[group, : len(padded)] = torch.tensor(padded, dtype=torch.int64).int()
    device = rows.device
    return HistoryLists(lists.groups.to(device), lists.words.to(device), lists.in_use.to(device), max_positions)


def _listed(histories: list[list[int]], max_positions: int) -> tuple[list[int], int]:
    """(words, how many come before the first cell that the step writes) of the cache rows by position of each entry."""
    last, everyone, width = len(histories[0]) - 1, (1 << len(histories)) - 1, next_power_of_two(len(histories))
    shared = next((t for t in range(last) if len({history[t] for history in histories}) > 1), last)
    words = [_word(histories[0][t], t, everyone, max_positions) for t in range(shared)]
    known = 0
    for t in range(shared, last + 1):
        known = len(words)
        words += [_word(history[t], t, 1 << entry, max_positions) for entry, history in enumerate(histories)]
        words += [_word(histories[0][0], 0, 0, max_positions)] * (width - len(histories))
    # in the first step of a sentence its start token, an entry of its own, writes the only earlier cell
    return words, 0 if last == 1 else known


def _word(row: int, position: int, seen_by: int, max_positions: int) -> int:
    word = seen_by << SEEN_BY | (row * max_positions + position)
    return word - (1 << 32) if word >> 31 else word


def _filler(words: list[int]) -> int:
    """The oldest cell of the group, seen by none."""
    return words[0] & ((1 << SEEN_BY) - 1) if words else 0
