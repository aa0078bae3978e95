"""The live sentences of one beam size: their state on the device, and the little that the host knows about them.

Legend: B sentences, N beams per sentence, V vocabulary, T positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.search.beam import advance_beams
from engine.search.greedy import advance_greedily
from engine.search.history import History, trace
from engine.search.rules import LogitRules
from engine.search.spec import ScoredTokens, SearchOutcome, SearchSpec
from engine.search.state import SearchState


@dataclass(slots=True)
class SearchGroup:
    """Sentences that advance together, one token a step. specs[b] and num_tokens[b] belong to entry b of every tensor."""

    specs: list[SearchSpec]
    num_tokens: list[int]
    state: SearchState

    @classmethod
    def start(cls, specs: Sequence[SearchSpec], history: History, *, start_token_id: int) -> SearchGroup:
        """New sentences of one beam size; notes their start and forced tokens in `history`."""
        num_positions = history.token_ids.shape[1]
        device = history.token_ids.device
        state = SearchState.start(specs, num_positions=num_positions, device=device)
        zeros = torch.zeros_like(state.rows)
        history.record(state.rows, zeros, torch.full_like(zeros, start_token_id), zeros)
        history.record(state.rows, zeros + 1, state.token_ids, zeros)
        return cls(list(specs), [1] * len(specs), state)

    def join(self, other: SearchGroup) -> None:
        """Take in the sentences of `other`, after our own."""
        self.specs += other.specs
        self.num_tokens += other.num_tokens
        self.state = self.state.concat(other.state)

    def keep(self, sentences: Sequence[int]) -> None:
        """Drop every sentence but those at these places."""
        if len(sentences) == len(self.specs):
            return
        self.specs = [self.specs[b] for b in sentences]
        self.num_tokens = [self.num_tokens[b] for b in sentences]
        self.state = self.state.select(torch.tensor(sentences, dtype=torch.int64).to(self.state.rows.device))

    def remove(self, source_slots: Collection[int]) -> None:
        """Drop the sentences of these slots."""
        self.keep([b for b, spec in enumerate(self.specs) if spec.source_slot not in source_slots])

    def advance(self, logits: Tensor, history: History, eos_token_id: int) -> list[SearchOutcome]:
        """One token for every sentence: float32 logits [B * N, V], overwritten. Finished sentences leave the group."""
        rules = LogitRules.of(spec.options for spec in self.specs)
        advance = advance_greedily if self.state.rows.shape[1] == 1 else advance_beams
        closed, broken = advance(self.state, logits, rules, history, eos_token_id)
        self.num_tokens = [n + 1 for n in self.num_tokens]
        leaving, failed = torch.stack([closed | broken, broken]).tolist()
        if not any(leaving):
            return []
        finished = [b for b, leaves in enumerate(leaving) if leaves]
        outcomes = [
            _outcome(self.specs[b], hypotheses, failed=failed[b])
            for b, hypotheses in zip(finished, self._read_hypotheses(finished, history), strict=True)
        ]
        self.keep([b for b, leaves in enumerate(leaving) if not leaves])
        return outcomes

    def _read_hypotheses(self, sentences: list[int], history: History) -> list[list[ScoredTokens]]:
        """Finished lists of these sentences, best first, copied to the host and traced back to their first token."""
        chosen = self.state.select(torch.tensor(sentences).to(self.state.rows.device))
        token_ids, parents = history.of_rows(chosen.rows)
        entries = torch.stack([chosen.hypothesis_beam, chosen.hypothesis_length, chosen.hypothesis_token], -1).tolist()
        scores, done = chosen.hypothesis_score.tolist(), chosen.hypothesis_done.tolist()
        return [
            [
                ScoredTokens((*trace(token_ids[i], parents[i], beam=beam, position=length - 1), last), scores[i][j])
                for j, (beam, length, last) in enumerate(entries[i])
                if done[i][j]
            ]
            for i in range(len(sentences))
        ]


def _outcome(spec: SearchSpec, hypotheses: Sequence[ScoredTokens], *, failed: bool) -> SearchOutcome:
    if failed:
        return SearchOutcome(spec.source_slot, (), "the model's logits are not finite; load it in a wider precision")
    if not hypotheses:
        return SearchOutcome(spec.source_slot, (), "the search options banned every token, so no hypothesis exists")
    return SearchOutcome(spec.source_slot, tuple(hypotheses[: spec.options.num_hypotheses]))
