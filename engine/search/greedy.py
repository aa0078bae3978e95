"""One step of greedy search for all sentences of beam size 1.

Tokens as transformers' generate(num_beams=1): argmax of the float32 logits, the first one on ties. transformers reports no
score there; ours is the one of beam search: summed log-probability / length ** length_penalty, the forced token counting 0.
Legend: B sentences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.search.history import History
from engine.search.rules import LogitRules
from engine.search.scoring import best_token, length_normalizer, log_softmax_
from engine.search.state import SearchState


def advance_greedily(
    state: SearchState, logits: Tensor, rules: LogitRules, history: History, eos_token_id: int
) -> tuple[Tensor, Tensor]:
    """Move every sentence of `state` one token on, in place. Returns closed bool[B], broken bool[B] (logits not finite).

    logits float32[B, V], overwritten. The rules ban among logits; the log-probability is that of the logits before them.
    """
    allowed = logits
    if rules:
        allowed = logits.clone()
        rules.ban(allowed, state, history, eos_token_id)
    token_ids = best_token(allowed)
    all_banned = allowed.gather(1, token_ids[:, None]).isneginf()
    logprobs = log_softmax_(logits)
    broken = logprobs[:, 0].isnan()
    logprob = logprobs.gather(1, token_ids[:, None]).masked_fill(all_banned, float("-inf"))
    state.cum_logprob = state.cum_logprob + logprob
    state.num_tokens += 1
    position = state.num_tokens[:, None]
    state.token_ids = token_ids[:, None]
    history.record(state.rows, position, state.token_ids, torch.zeros_like(position))
    closed = (token_ids == eos_token_id) | (state.num_tokens >= state.max_tokens)
    # The finished list is read only when the sentence closes: until then it holds the running hypothesis.
    state.hypothesis_score = state.cum_logprob / length_normalizer(state.num_tokens, state.length_penalty)[:, None]
    state.hypothesis_done = closed[:, None] & state.cum_logprob.isfinite()
    state.hypothesis_token = state.token_ids
    state.hypothesis_length = position.clone()
    return closed, broken
