"""Finished sentences of the device's tables as outcomes. N cache rows, T positions, P slots, M hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.search.spec import ScoredTokens, SearchOutcome

_SIDE_BY_SIDE = 16  # from so many sentences on a position of all of them costs numpy less than Python's loop over them


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What the host knows of N sentences that have finished, int32: slots [N], num_beams [N], limits [N] (hypotheses
    wanted), rows [N, 8] (cache rows of the beams, behind them any)."""

    slots: NDArray[np.int32]
    num_beams: NDArray[np.int32]
    limits: NDArray[np.int32]
    rows: NDArray[np.int32]


def trace(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], finished: Finished
) -> list[list[ScoredTokens]]:
    """Finished hypotheses of each sentence, best first: their tokens from the forced one on, followed back through their
    parents. history [rows, T, 2], hypotheses [P, 8, 4] and scores [P, 8] as in BeamTables."""
    if len(finished.slots) >= _SIDE_BY_SIDE:
        return _trace_side_by_side(history, hypotheses, scores, finished)
    fields = (array.tolist() for array in (finished.slots, finished.num_beams, finished.limits))
    return [
        _trace_one(history, hypotheses[slot], scores[slot], rows[:num_beams], limit)
        for slot, num_beams, limit, rows in zip(*fields, finished.rows, strict=True)
    ]


def _trace_one(
    history: NDArray[np.int32],
    hypotheses: NDArray[np.int32],
    scores: NDArray[np.float32],
    rows: NDArray[np.int32],
    limit: int,
) -> list[ScoredTokens]:
    """hypotheses [8, 4] and scores [8] of one sentence."""
    width = int(hypotheses[:, 3].max())
    # one flat list: nested ones would be thousands of objects for the garbage collector
    cells = history[rows, :width].reshape(-1).tolist()
    found: list[ScoredTokens] = []
    for (is_done, beam, last, length), score in zip(hypotheses.tolist(), scores.tolist(), strict=True):
        if not is_done or len(found) == limit:
            break
        tokens, origin = [last], beam
        for t in range(length - 1, 0, -1):
            place = 2 * (origin * width + t)
            tokens.append(cells[place])
            origin = cells[place + 1]
        found.append(ScoredTokens(tuple(tokens[::-1]), score))
    return found


def _trace_side_by_side(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], finished: Finished
) -> list[list[ScoredTokens]]:
    """As `_trace_one` for every sentence: all hypotheses go back one position at a time. It runs once in many steps, with
    nothing of it in the processor's caches: what counts is how few different things it does."""
    most = int(finished.limits.max())
    ended = hypotheses[finished.slots, :most]
    wanted = ended[:, :, 0] != 0
    if most > 1:
        wanted = np.logical_and.accumulate(wanted, axis=1) & (np.arange(most) < finished.limits[:, None])
    sentence, place = wanted.nonzero()
    _, beams, last, lengths = ended[sentence, place].T
    width = int(lengths.max(initial=2))
    num_sentences, num_beams = len(finished.slots), int(finished.num_beams.max())
    cells = history[finished.rows[:, :num_beams], :width].reshape(-1, 2)
    # where the path through a cell goes on, for every cell; from position 0 nobody does
    before = cells[:, 1].reshape(num_sentences, num_beams, width).astype(np.int64)
    before += num_beams * np.arange(num_sentences)[:, None, None]
    before *= width
    before += np.arange(-1, width - 1)
    before[:, :, 0] = 0
    take = before.reshape(-1).take
    path = np.empty((width, len(last)), dtype=np.int64)  # cells by the position they would have in the longest hypothesis
    here = (num_beams * sentence + beams) * width + lengths - 1
    path[width - 2], path[width - 1] = here, 0
    for t in range(width - 3, -1, -1):
        here = take(here, out=path[t], mode="clip")  # raising would take a copy of `out`
    tokens = cells[:, 0][path]
    tokens[width - 1] = last
    best = scores[finished.slots[sentence], place].tolist()
    found: list[list[ScoredTokens]] = [[] for _ in range(num_sentences)]
    for at, row, length, score in zip(sentence.tolist(), tokens.T.tolist(), lengths.tolist(), best, strict=True):
        found[at].append(ScoredTokens(tuple(row[width - length :]), score))
    return found


def outcome(slot: int, hypotheses: Sequence[ScoredTokens], *, is_broken: bool) -> SearchOutcome:
    """What is given back for the sentence of a slot; without hypotheses it says why."""
    if is_broken:
        return SearchOutcome(slot, (), "the model's logits are not finite; load it in a wider precision")
    if not hypotheses:
        return SearchOutcome(slot, (), "the search options banned every token, so no hypothesis exists")
    return SearchOutcome(slot, tuple(hypotheses))
