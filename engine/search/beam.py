"""One step of beam search for all sentences of one beam size: transformers' generate() rule for rule.

2N candidates a sentence; an eos counts only among the N best; the N best others run on; a sentence closes when no running
beam can still beat its worst finished hypothesis (`early_stopping` chooses the bound).
Legend: B sentences, N beams per sentence, K = 2N candidates, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.search.history import History
from engine.search.rules import LogitRules
from engine.search.scoring import NEVER, length_normalizer, log_softmax_, top_tokens
from engine.search.state import SearchState


class Candidates(NamedTuple):
    """The K best continuations of every sentence, best first, each [B, K].

    cum_logprob float32; beams int64: the running beam continued; token_ids int64; stops bool: it ends here.
    """

    cum_logprob: Tensor
    beams: Tensor
    token_ids: Tensor
    stops: Tensor


def advance_beams(
    state: SearchState, logits: Tensor, rules: LogitRules, history: History, eos_token_id: int
) -> tuple[Tensor, Tensor]:
    """Move every sentence of `state` one token on, in place. Returns closed bool[B], broken bool[B] (logits not finite).

    logits float32[B * N, V], overwritten. The rules ban among log-probabilities, which are not normalised again.
    """
    logprobs = log_softmax_(logits)
    broken = logprobs[:, 0].isnan().view(state.rows.shape).any(1)
    if rules:
        rules.ban(logprobs, state, history, eos_token_id)
    candidates = _rank(state, logprobs, eos_token_id)
    _finish_hypotheses(state, candidates)
    _continue_beams(state, candidates, history)
    state.num_tokens += 1
    return _closed(state), broken


def _rank(state: SearchState, logprobs: Tensor, eos_token_id: int) -> Candidates:
    num_sentences, num_beams = state.rows.shape
    values, token_ids = top_tokens(logprobs, 2 * num_beams)
    per_beam = values.shape[1]
    sums = values.view(num_sentences, num_beams, per_beam) + state.cum_logprob[:, :, None]
    cum_logprob, picked = sums.flatten(1).topk(2 * num_beams)
    token_ids = token_ids.view(num_sentences, num_beams * per_beam).gather(1, picked)
    at_limit = state.num_tokens + 1 >= state.max_tokens
    return Candidates(cum_logprob, picked // per_beam, token_ids, (token_ids == eos_token_id) | at_limit[:, None])


def _finish_hypotheses(state: SearchState, candidates: Candidates) -> None:
    """Merge the candidates that stop, and rank among the N best, into the finished lists."""
    num_beams = state.rows.shape[1]
    length = state.num_tokens + 1
    score = candidates.cum_logprob / length_normalizer(length, state.length_penalty)[:, None]
    done = candidates.stops.clone()
    done[:, num_beams:] = False
    score += torch.where(done, 0.0, NEVER)
    merged = torch.cat([state.hypothesis_score, score], 1)
    state.hypothesis_score, order = merged.topk(num_beams)

    def merge(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new], 1).gather(1, order)

    state.hypothesis_done = merge(state.hypothesis_done, done)
    state.hypothesis_beam = merge(state.hypothesis_beam, candidates.beams)
    state.hypothesis_token = merge(state.hypothesis_token, candidates.token_ids)
    state.hypothesis_length = merge(state.hypothesis_length, length[:, None].expand_as(candidates.beams))


def _continue_beams(state: SearchState, candidates: Candidates, history: History) -> None:
    """The N best candidates that do not stop become the running beams; their ancestry follows their parent's."""
    num_sentences, num_beams = state.rows.shape
    running = candidates.cum_logprob + torch.where(candidates.stops, NEVER, 0.0)
    state.cum_logprob, picked = running.topk(num_beams)
    state.token_ids = candidates.token_ids.gather(1, picked)
    parents = candidates.beams.gather(1, picked)
    first_row = torch.arange(0, num_sentences * num_beams, num_beams, device=parents.device)
    ancestry = state.ancestry.flatten(0, 1).index_select(0, (parents + first_row[:, None]).flatten())
    position = (state.num_tokens + 1)[:, None].expand_as(parents)
    state.ancestry = ancestry.view_as(state.ancestry).scatter_(2, position[:, :, None], state.rows[:, :, None])
    history.record(state.rows, position, state.token_ids, parents)


def _closed(state: SearchState) -> Tensor:
    """True where nothing can change any more, or where the length limit is reached. bool[B]."""
    length = torch.where(state.bounds_by_max, state.max_tokens, state.num_tokens)
    best_running = state.cum_logprob[:, 0] / length_normalizer(length, state.length_penalty)
    worst = state.hypothesis_score.amin(1, keepdim=True)
    may_improve = (best_running[:, None] > torch.where(state.hypothesis_done, worst, NEVER)).any(1)
    full = state.stops_when_full & state.hypothesis_done.all(1)
    return ~may_improve | full | (state.num_tokens >= state.max_tokens)
