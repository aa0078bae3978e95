"""What became of sentences that ended, out of the results that the device leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.search.spec import ScoredTokens, SearchOutcome
from kernels.beam_search.tables import BROKEN, FIRST_TOKEN


def outcomes(
    results: NDArray[np.int32], slots: Sequence[int], limits: Sequence[int], status: NDArray[np.int32]
) -> list[SearchOutcome]:
    """One for each sentence, in the order of `slots` [B], with at most limits [B] hypotheses; without any it says why.

    results int32[K, P, T + 2] as in BeamTables, of the K = max(limits) best places; status int32[P].
    """
    at = np.array(slots)
    chosen, ended_as = results[:, at], status[at].tolist()
    lengths, scores = chosen[:, :, 0].tolist(), chosen[:, :, 1].view(np.float32).tolist()
    longest = max(map(max, lengths))
    # one flat list: one for each hypothesis would be as many objects for the garbage collector
    flat, starts = chosen[:, :, FIRST_TOKEN : FIRST_TOKEN + longest].ravel().tolist(), itertools.count(0, longest)
    places = [
        [
            ScoredTokens(tuple(flat[start : start + length]), score)
            for length, score, start in zip(lengths_here, scores_here, starts, strict=False)  # starts have no end
        ]
        for lengths_here, scores_here in zip(lengths, scores, strict=True)
    ]
    return [
        _outcome(slot, hypotheses[:limit], kind == BROKEN)
        for slot, limit, kind, hypotheses in zip(slots, limits, ended_as, zip(*places, strict=True), strict=True)
    ]


def _outcome(slot: int, hypotheses: tuple[ScoredTokens, ...], is_broken: bool) -> SearchOutcome:
    """hypotheses: places of the finished list, best first; those that nothing has come to have no tokens and come last."""
    if is_broken:
        return SearchOutcome(slot, (), "the model's logits are not finite; load it in a wider precision")
    if not hypotheses[-1].token_ids:
        hypotheses = tuple(hypothesis for hypothesis in hypotheses if hypothesis.token_ids)
        if not hypotheses:
            return SearchOutcome(slot, (), "the search options banned every token, so no hypothesis exists")
    return SearchOutcome(slot, hypotheses)
