"""What search is told about one sentence, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.types import SearchOptions


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """One sentence to search for.

    source_slot names it until it finishes. beam_rows: cache rows it owns, `options.beam_size` of them.
    forced_token_id: first generated token (the target language). max_tokens: generated tokens at most,
    forced token and eos included; at least 2. Raises ValueError.
    """

    source_slot: int
    beam_rows: tuple[int, ...]
    forced_token_id: int
    max_tokens: int
    options: SearchOptions

    def __post_init__(self) -> None:
        if len(self.beam_rows) != self.options.beam_size:
            raise ValueError(f"{len(self.beam_rows)} rows given for beam_size {self.options.beam_size}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; the forced token is the first, choose 2 or more")


# Named tuples: many are made at once while the device may wait, and a frozen dataclass takes twice as long to make.
class ScoredTokens(NamedTuple):
    """One hypothesis: generated ids (forced token first, eos last where reached) and its score after length penalty."""

    token_ids: tuple[int, ...]
    score: float


class SearchOutcome(NamedTuple):
    """A sentence that finished: its hypotheses, best first; none when there is nothing to return, and `failure` says why."""

    source_slot: int
    hypotheses: tuple[ScoredTokens, ...]
    failure: str | None = None
