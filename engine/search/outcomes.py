"""Finished sentences of the device's tables as outcomes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.search.spec import ScoredTokens, SearchOutcome, SearchSpec


def trace(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], spec: SearchSpec
) -> list[ScoredTokens]:
    """Finished hypotheses of one sentence, best first: their tokens from the forced one on, followed back through their
    parents. history [beams, T, 2]; hypotheses [8, 4] and scores [8] as in BeamTables."""
    width = history.shape[1]
    # one flat list: nested ones would be thousands of objects for the garbage collector
    cells = history.reshape(-1).tolist()
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


def outcome(spec: SearchSpec, hypotheses: Sequence[ScoredTokens], *, is_broken: bool) -> SearchOutcome:
    """What is given back for one sentence; without hypotheses it says why."""
    if is_broken:
        return SearchOutcome(spec.source_slot, (), "the model's logits are not finite; load it in a wider precision")
    if not hypotheses:
        return SearchOutcome(spec.source_slot, (), "the search options banned every token, so no hypothesis exists")
    return SearchOutcome(spec.source_slot, tuple(hypotheses))
