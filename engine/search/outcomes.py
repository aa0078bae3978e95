"""Finished sentences of the device's tables as outcomes. N cache rows, T positions, P slots, M hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.search.spec import ScoredTokens, SearchOutcome, SearchSpec

_SIDE_BY_SIDE = 16  # from so many sentences on a position of all of them costs numpy less than Python's loop over them


def trace(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], specs: Sequence[SearchSpec]
) -> list[list[ScoredTokens]]:
    """Finished hypotheses of each sentence, best first: their tokens from the forced one on, followed back through their
    parents. history [N, T, 2], hypotheses [P, 8, 4] and scores [P, 8] as in BeamTables."""
    if len(specs) >= _SIDE_BY_SIDE:
        return _trace_side_by_side(history, hypotheses, scores, specs)
    return [_trace_one(history, hypotheses[spec.source_slot], scores[spec.source_slot], spec) for spec in specs]


def _trace_one(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], spec: SearchSpec
) -> list[ScoredTokens]:
    """hypotheses [8, 4] and scores [8] of one sentence."""
    width = int(hypotheses[:, 3].max())
    # one flat list: nested ones would be thousands of objects for the garbage collector
    cells = history[list(spec.beam_rows), :width].reshape(-1).tolist()
    found: list[ScoredTokens] = []
    for (is_done, beam, last, length), score in zip(hypotheses.tolist(), scores.tolist(), strict=True):
        if not is_done or len(found) == spec.options.num_hypotheses:
            break
        tokens, origin = [last], beam
        for t in range(length - 1, 0, -1):
            place = 2 * (origin * width + t)
            tokens.append(cells[place])
            origin = cells[place + 1]
        found.append(ScoredTokens(tuple(tokens[::-1]), score))
    return found


def _trace_side_by_side(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], specs: Sequence[SearchSpec]
) -> list[list[ScoredTokens]]:
    """As `_trace_one` for every sentence: all hypotheses go back one position at a time."""
    slots = [spec.source_slot for spec in specs]
    limits = np.array([spec.options.num_hypotheses for spec in specs])[:, None]
    finished = hypotheses[slots]
    wanted = np.logical_and.accumulate(finished[:, :, 0] != 0, axis=1) & (np.arange(finished.shape[1]) < limits)
    sentence, _ = wanted.nonzero()
    _, beams, last, lengths = finished[wanted].T.astype(np.int64)
    width = int(lengths.max(initial=1))
    counts = np.array([len(spec.beam_rows) for spec in specs])
    starts = np.cumsum(counts) - counts  # where the beams of a sentence begin among all
    cells = history[[row for spec in specs for row in spec.beam_rows], :width]
    before = (np.repeat(starts, counts)[:, None] + cells[:, :, 1]) * width + np.arange(-1, width - 1)
    before[:, 0] = 0  # nobody goes on from there
    flat, path = before.reshape(-1), np.empty((width, len(beams)), dtype=np.int64)
    path[0] = (starts[sentence] + beams) * width + lengths - 1
    for here, before_it in pairwise(path):
        np.take(flat, here, out=before_it, mode="clip")  # raising would take a copy of `out`
    tokens = cells[:, :, 0].reshape(-1)[path].T.tolist()  # of each hypothesis, backwards
    found: list[list[ScoredTokens]] = [[] for _ in specs]
    best = scores[slots][wanted].tolist()
    for at, back, token, length, score in zip(sentence.tolist(), tokens, last.tolist(), lengths.tolist(), best, strict=True):
        found[at].append(ScoredTokens((*back[: length - 1][::-1], token), score))
    return found


def outcome(spec: SearchSpec, hypotheses: Sequence[ScoredTokens], *, is_broken: bool) -> SearchOutcome:
    """What is given back for one sentence; without hypotheses it says why."""
    if is_broken:
        return SearchOutcome(spec.source_slot, (), "the model's logits are not finite; load it in a wider precision")
    if not hypotheses:
        return SearchOutcome(spec.source_slot, (), "the search options banned every token, so no hypothesis exists")
    return SearchOutcome(spec.source_slot, tuple(hypotheses))
