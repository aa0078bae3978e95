"""Logit rules: which tokens a row may not choose. The order among them does not matter, all of them only ban.

Same rules as transformers' NoRepeatNGramLogitsProcessor and MinNewTokensLengthLogitsProcessor.
Legend: L live rows, V vocabulary, t tokens so far, W windows, B sentences, N beams per sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.search.history import History
from engine.search.state import SearchState
from engine.types import SearchOptions


@dataclass(frozen=True, slots=True)
class LogitRules:
    """Which rules any sentence of a group asks for; what each asks exactly is in its SearchState."""

    min_tokens: bool
    ngram_sizes: tuple[int, ...]

    @classmethod
    def of(cls, options: Iterable[SearchOptions]) -> Self:
        """The rules these sentences ask for."""
        asked = list(options)
        sizes = {o.no_repeat_ngram_size for o in asked} - {0}
        return cls(any(o.min_target_tokens for o in asked), tuple(sorted(sizes)))

    def __bool__(self) -> bool:
        return self.min_tokens or bool(self.ngram_sizes)

    def ban(self, scores: Tensor, state: SearchState, history: History, eos_token_id: int) -> None:
        """Set what may not be chosen to -inf: scores float32[B * N, V] (logits or log-probabilities), in place."""
        num_beams = state.rows.shape[1]
        num_tokens = state.num_tokens.repeat_interleave(num_beams)
        if self.min_tokens:
            ban_early_eos(scores, num_tokens, state.min_tokens.repeat_interleave(num_beams), eos_token_id)
        if self.ngram_sizes:
            prefixes = history.prefixes(state.ancestry.flatten(0, 1))
            sizes = state.ngram_sizes.repeat_interleave(num_beams)
            for size in self.ngram_sizes:
                ban_repeated_ngrams(scores, prefixes, num_tokens, sizes, size)


def ban_early_eos(logits: Tensor, num_tokens: Tensor, min_tokens: Tensor, eos_token_id: int) -> None:
    """Set eos to -inf where num_tokens < min_tokens. logits [L, V] in place; num_tokens, min_tokens int64[L]."""
    logits[:, eos_token_id].masked_fill_(num_tokens < min_tokens, float("-inf"))


def ban_repeated_ngrams(logits: Tensor, prefixes: Tensor, num_tokens: Tensor, ngram_sizes: Tensor, size: int) -> None:
    """Set to -inf every token that would complete an n-gram its row already holds, in rows whose size is `size`.

    logits [L, V] in place. prefixes int64[L, t], start token first; row r has num_tokens[r] + 1 valid columns, and its
    n-grams count the start token. ngram_sizes int64[L]: 0 where the rule is off.
    """
    num_windows = prefixes.shape[1] - size + 1
    if num_windows < 1:
        return
    windows = prefixes.unfold(1, size, 1)  # [L, W, size]
    last_start = num_tokens + 1 - (size - 1)  # where the last size - 1 tokens of a row begin
    columns = last_start.clamp(min=0)[:, None] + torch.arange(size - 1, device=logits.device)
    latest = prefixes.gather(1, columns.clamp(max=prefixes.shape[1] - 1))
    starts = torch.arange(num_windows, device=logits.device)
    repeats = (windows[:, :, :-1] == latest[:, None]).all(-1)
    repeats &= (starts + size <= num_tokens[:, None] + 1) & (ngram_sizes == size)[:, None]
    banned = torch.where(repeats, windows[:, :, -1], logits.shape[1])  # one column more, thrown away, for "nothing"
    mask = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    mask.scatter_(1, banned, value=True)
    logits.masked_fill_(mask[:, :-1], float("-inf"))
