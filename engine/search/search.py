"""Search over all live sentences, whatever their beam sizes: gives the decoder its inputs, takes its logits.

Legend: R live rows, P sentences at their first step, V vocabulary, T positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.search.group import SearchGroup
from engine.search.history import History
from engine.search.spec import SearchOutcome, SearchSpec


class DecodeInputs(NamedTuple):
    """What one decode step reads: token_ids, positions, rows, source_slots int64[R + P]; ancestry int64[R + P, t].

    rows[r] is the cache row written at positions[r]; ancestry[r, t] the row that holds position t, t <= positions[r].
    The last P entries are start tokens: each sentence's first step feeds the start token (position 0, through its first
    row) along with the forced token (position 1), which reads what the same step has just written.
    """

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    source_slots: Tensor
    ancestry: Tensor


class Search:
    """Groups of sentences by beam size. Each step: `inputs()`, a decoder call, `advance(logits)`."""

    def __init__(
        self, *, num_rows: int, max_target_tokens: int, start_token_id: int, eos_token_id: int, device: torch.device
    ) -> None:
        self._history = History(num_rows=num_rows, max_target_tokens=max_target_tokens, device=device)
        self._start_token_id = start_token_id
        self._eos_token_id = eos_token_id
        self._groups: dict[int, SearchGroup] = {}
        self._beginning: list[SearchSpec] = []  # their start token is not fed yet

    @property
    def num_rows(self) -> int:
        """Live rows of all sentences."""
        return sum(beam_size * len(group.specs) for beam_size, group in self._groups.items())

    def add(self, specs: Iterable[SearchSpec]) -> None:
        """Start sentences; their rows and slots must be free."""
        by_beam_size: dict[int, list[SearchSpec]] = {}
        for spec in specs:
            by_beam_size.setdefault(spec.options.beam_size, []).append(spec)
            self._beginning.append(spec)
        for beam_size, members in by_beam_size.items():
            started = SearchGroup.start(members, self._history, start_token_id=self._start_token_id)
            if beam_size in self._groups:
                self._groups[beam_size].join(started)
            else:
                self._groups[beam_size] = started

    def remove(self, source_slots: Collection[int]) -> None:
        """Drop sentences without a result (cancelled, past their deadline, or hit by an error)."""
        for group in self._groups.values():
            group.remove(source_slots)
        self._beginning = [spec for spec in self._beginning if spec.source_slot not in source_slots]
        self._drop_empty_groups()

    def clear(self) -> None:
        """Drop every sentence without a result, touching no device memory."""
        self._groups.clear()
        self._beginning.clear()

    def inputs(self) -> DecodeInputs:
        """Inputs of the next decode step; there must be live rows."""
        groups = list(self._groups.values())
        num_positions = max(max(group.num_tokens) for group in groups) + 1
        parts = []
        for group in groups:
            state, num_beams = group.state, group.state.rows.shape[1]
            parts.append(
                DecodeInputs(
                    state.token_ids.flatten(),
                    state.num_tokens.repeat_interleave(num_beams),
                    state.rows.flatten(),
                    state.source_slots.repeat_interleave(num_beams),
                    state.ancestry.flatten(0, 1)[:, :num_positions],
                )
            )
        if self._beginning:
            parts.append(self._start_tokens(num_positions))
        return parts[0] if len(parts) == 1 else DecodeInputs(*map(torch.cat, zip(*parts, strict=True)))

    def advance(self, logits: Tensor) -> list[SearchOutcome]:
        """One token for every live row, from float32 logits [R + P, V] in the order of `inputs()` (overwritten).

        Returns the sentences that finished; their rows and slots are free again.
        """
        outcomes: list[SearchOutcome] = []
        self._beginning.clear()
        start = 0
        for beam_size, group in self._groups.items():
            stop = start + beam_size * len(group.specs)
            outcomes += group.advance(logits[start:stop], self._history, self._eos_token_id)
            start = stop
        self._drop_empty_groups()
        return outcomes

    def _start_tokens(self, num_positions: int) -> DecodeInputs:
        device = self._history.token_ids.device
        rows = torch.tensor([spec.beam_rows[0] for spec in self._beginning]).to(device)
        source_slots = torch.tensor([spec.source_slot for spec in self._beginning]).to(device)
        start_tokens, positions = torch.full_like(rows, self._start_token_id), torch.zeros_like(rows)
        return DecodeInputs(start_tokens, positions, rows, source_slots, rows[:, None].expand(-1, num_positions))

    def _drop_empty_groups(self) -> None:
        self._groups = {beam_size: group for beam_size, group in self._groups.items() if group.specs}
