"""Plain Python truth of one search step of one sentence, written as a loop over lists, without a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

NEVER = -1.0e9


@dataclass
class Hypothesis:
    """One place of the finished list."""

    score: float = NEVER
    done: bool = False
    beam: int = 0
    last_token: int = 0
    length: int = 0
    tokens: tuple[int, ...] = ()  # from the forced one on


@dataclass
class SentenceState:
    """A sentence as the tables hold it; prefixes[j] are the tokens of beam j, the start token first."""

    num_beams: int
    max_tokens: int
    stops_when_full: bool
    bounds_by_max: bool
    normalizers: list[float]
    prefixes: list[list[int]]
    cum_logprob: list[float]
    finished: list[Hypothesis] = field(default_factory=list)
    closed: bool = False


def advance_sentence_reference(
    state: SentenceState, values: list[list[float]], token_ids: list[list[int]], eos_token_id: int
) -> None:
    """Move one sentence one token on, in place. values, token_ids [N, K]: each beam's best log-probabilities, best first."""
    n, position = state.num_beams, len(state.prefixes[0])
    norm = state.normalizers[position]
    candidates = sorted(
        (
            (state.cum_logprob[j] + value, j, token)
            for j in range(n)
            for value, token in zip(values[j], token_ids[j], strict=True)
        ),
        key=lambda candidate: -candidate[0],
    )[: 2 * n]
    at_limit = position >= state.max_tokens
    if n == 1:
        total, _, token = candidates[0]
        state.prefixes[0].append(token)
        state.cum_logprob = [total]
        state.closed = token == eos_token_id or at_limit
        tokens = tuple(state.prefixes[0][1:])
        state.finished = [Hypothesis(total / norm, state.closed and total > float("-inf"), 0, token, position, tokens)]
        return
    merged = list(state.finished)
    running = []
    for rank, (total, beam, token) in enumerate(candidates):
        stops = token == eos_token_id or at_limit
        done = stops and rank < n
        tokens = (*state.prefixes[beam][1:], token)
        merged.append(Hypothesis(total / norm + (0.0 if done else NEVER), done, beam, token, position, tokens))
        running.append((total + (NEVER if stops else 0.0), beam, token))
    state.finished = sorted(merged, key=lambda hypothesis: -hypothesis.score)[:n]
    running = sorted(running, key=lambda candidate: -candidate[0])[:n]
    state.prefixes = [[*state.prefixes[beam], token] for _, beam, token in running]
    state.cum_logprob = [total for total, _, _ in running]
    best = state.cum_logprob[0] / state.normalizers[state.max_tokens if state.bounds_by_max else position]
    worst = min(hypothesis.score for hypothesis in state.finished)
    improves = any(best > (worst if hypothesis.done else NEVER) for hypothesis in state.finished)
    full = state.stops_when_full and all(hypothesis.done for hypothesis in state.finished)
    state.closed = not improves or full or at_limit
