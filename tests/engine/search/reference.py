"""Beam and greedy search in plain Python, one sentence at a time: the independent truth for engine.search.

Lists and numpy float32 scalars; no torch, nothing shared with the engine but SearchOptions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.types import SearchOptions

NEVER = np.float32(-1e9)
LogitsOf = Callable[[tuple[int, ...]], np.ndarray]


def search_reference(
    logits_of: LogitsOf, *, options: SearchOptions, forced: int, max_tokens: int, start: int = 2, eos: int = 2
) -> list[tuple[tuple[int, ...], float]]:
    """Hypotheses (ids without the start token, score), best first. logits_of(prefix) gives float32[V]."""
    if options.beam_size == 1:
        return [_greedy(logits_of, options, forced, max_tokens, start, eos)]
    return _beam(logits_of, options, forced, max_tokens, start, eos)


def _logprobs(logits: np.ndarray) -> np.ndarray:
    shifted = (logits - logits.max()).astype(np.float64)
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def _apply_rules(values: np.ndarray, prefix: tuple[int, ...], options: SearchOptions, forced: int, eos: int) -> np.ndarray:
    values = values.copy()
    g = options.no_repeat_ngram_size
    if g:
        for i in range(len(prefix) - g + 1):
            gram = prefix[i : i + g]
            if gram[:-1] == prefix[len(prefix) - g + 1 :]:
                values[gram[-1]] = -np.inf
    if len(prefix) - 1 < options.min_target_tokens:
        values[eos] = -np.inf
    if len(prefix) == 1:
        values[:] = -np.inf
        values[forced] = 0.0
    return values


def _greedy(logits_of, options, forced, max_tokens, start, eos):
    prefix, total = (start,), 0.0
    while True:
        logits = logits_of(prefix)
        token = int(np.argmax(_apply_rules(logits, prefix, options, forced, eos)))
        total += 0.0 if len(prefix) == 1 else float(_logprobs(logits)[token])
        prefix = (*prefix, token)
        if token == eos or len(prefix) - 1 >= max_tokens:
            return prefix[1:], total / (len(prefix) - 1) ** options.length_penalty


def _beam(logits_of, options, forced, max_tokens, start, eos):
    nb, a = options.beam_size, options.length_penalty
    run = [((start,), np.float32(0))] + [((start,), NEVER)] * (nb - 1)
    fin = [((start,), NEVER, False)] * nb
    for n in range(1, max_tokens + 1):  # n: generated tokens after this step
        candidates = []
        for prefix, total in run:
            logprobs = _apply_rules(_logprobs(logits_of(prefix)), prefix, options, forced, eos)
            candidates += [((*prefix, v), np.float32(total + logprobs[v])) for v in range(len(logprobs))]
        candidates = sorted(candidates, key=lambda c: -c[1])[: 2 * nb]
        stops = [c[0][-1] == eos or n >= max_tokens for c in candidates]
        going = [(p, np.float32(s + (NEVER if stop else 0))) for (p, s), stop in zip(candidates, stops, strict=True)]
        run = sorted(going, key=lambda c: -c[1])[:nb]
        for rank, ((prefix, total), stop) in enumerate(zip(candidates, stops, strict=True)):
            done = stop and rank < nb
            score = np.float32(np.float32(total / np.float32(n**a)) + (0 if done else NEVER))
            fin.append((prefix, score, done))
        fin = sorted(fin, key=lambda f: -f[1])[:nb]
        length = max_tokens if options.early_stopping == "never" and a > 0 else n
        best = np.float32(run[0][1] / np.float32(length**a))
        worst = min(f[1] for f in fin)
        is_open = any(best > (worst if done else NEVER) for _, _, done in fin)
        if not is_open or (options.early_stopping is True and all(f[2] for f in fin)):
            break
    return [(prefix[1:], float(score)) for prefix, score, done in fin if done][: options.num_hypotheses]
