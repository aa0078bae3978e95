"""Everything search knows about the live sentences of one beam size, as tensors; no loop over sentences reads it.

Legend: B sentences, N beams per sentence, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from engine.search.scoring import NEVER
from engine.search.spec import SearchSpec


@dataclass(slots=True)
class SearchState:
    """Tensors with one entry per sentence, in the order of its group.

    Fixed: rows int64[B, N], source_slots, max_tokens, min_tokens, ngram_sizes int64[B], length_penalty
    float64[B], stops_when_full bool[B] (early_stopping True), bounds_by_max bool[B] (early_stopping "never").
    Moving: num_tokens int64[B] generated so far = position of the token fed next, token_ids int64[B, N] fed next,
    cum_logprob float32[B, N] best first, ancestry int64[B, N, T + 1]: cache row that holds position t of a beam.
    Finished list, best first: hypothesis_score float32[B, N], hypothesis_done bool[B, N], and where to read it back:
    hypothesis_beam, hypothesis_token (its last), hypothesis_length int64[B, N].
    """

    rows: Tensor
    source_slots: Tensor
    max_tokens: Tensor
    min_tokens: Tensor
    ngram_sizes: Tensor
    length_penalty: Tensor
    stops_when_full: Tensor
    bounds_by_max: Tensor
    num_tokens: Tensor
    token_ids: Tensor
    cum_logprob: Tensor
    ancestry: Tensor
    hypothesis_score: Tensor
    hypothesis_done: Tensor
    hypothesis_beam: Tensor
    hypothesis_token: Tensor
    hypothesis_length: Tensor

    @classmethod
    def start(cls, specs: Sequence[SearchSpec], *, num_positions: int, device: torch.device) -> Self:
        """Sentences of one beam size with their forced token chosen. num_positions: columns of ancestry (T + 1).

        The forced token has log-probability 0 and counts in the length. The start token before it (position 0) is fed
        once, through each sentence's first row.
        """
        options = [spec.options for spec in specs]

        def integers(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64).to(device)

        def flags(values: Iterable[bool]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.bool).to(device)

        rows = torch.tensor([spec.beam_rows for spec in specs], dtype=torch.int64).to(device)
        zeros = torch.zeros_like(rows)
        never = torch.full(rows.shape, NEVER, device=device)
        cum_logprob = never.clone()
        cum_logprob[:, 0] = 0.0  # all beams start alike: only the first may branch
        ancestry = rows[:, :, None].repeat(1, 1, num_positions)
        ancestry[:, :, 0] = rows[:, :1]
        return cls(
            rows=rows,
            source_slots=integers(spec.source_slot for spec in specs),
            max_tokens=integers(spec.max_tokens for spec in specs),
            min_tokens=integers(o.min_target_tokens for o in options),
            ngram_sizes=integers(o.no_repeat_ngram_size for o in options),
            length_penalty=torch.tensor([o.length_penalty for o in options], dtype=torch.float64).to(device),
            stops_when_full=flags(o.early_stopping is True for o in options),
            bounds_by_max=flags(o.early_stopping == "never" and o.length_penalty > 0 for o in options),
            num_tokens=torch.ones_like(rows[:, 0]),
            token_ids=integers(spec.forced_token_id for spec in specs)[:, None].expand_as(rows),
            cum_logprob=cum_logprob,
            ancestry=ancestry,
            hypothesis_score=never,
            hypothesis_done=torch.zeros_like(rows, dtype=torch.bool),
            hypothesis_beam=zeros.clone(),
            hypothesis_token=zeros.clone(),
            hypothesis_length=zeros.clone(),
        )

    def select(self, sentences: Tensor) -> SearchState:
        """Only `sentences` (int64, positions in this group), in that order."""
        return self._map(lambda tensor: tensor.index_select(0, sentences))

    def concat(self, other: SearchState) -> SearchState:
        """These sentences followed by those of `other`."""
        mine, theirs = self._tensors(), other._tensors()
        return SearchState(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))

    def _map(self, operation: Callable[[Tensor], Tensor]) -> SearchState:
        return SearchState(*map(operation, self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]
