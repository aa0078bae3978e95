"""What became of sentences that ended, out of the results that the device leaves behind."""

from __future__ import annotations

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
    chosen = results.transpose(1, 0, 2)[at]
    lengths = chosen[:, :, 0]
    counts = np.minimum(np.count_nonzero(lengths, axis=1), limits).tolist()
    chosen = chosen[:, :, : FIRST_TOKEN + int(lengths.max())]
    scores = chosen[:, :, 1].view(np.float32).reshape(-1).tolist()
    # one flat list: one for each hypothesis would be as many objects for the garbage collector
    flat, starts = chosen.reshape(-1).tolist(), range(FIRST_TOKEN, chosen.size + 1, chosen.shape[2])
    places = [
        ScoredTokens(tuple(flat[start : start + length]), score)
        for start, length, score in zip(starts, lengths.reshape(-1).tolist(), scores, strict=True)
    ]
    firsts = range(0, len(places), len(results))
    is_broken = (status[at] == BROKEN).tolist()
    return [
        _outcome(slot, () if broken else tuple(places[first : first + count]), is_broken=broken)
        for slot, first, count, broken in zip(slots, firsts, counts, is_broken, strict=True)
    ]


def _outcome(slot: int, hypotheses: tuple[ScoredTokens, ...], *, is_broken: bool) -> SearchOutcome:
    if hypotheses:
        return SearchOutcome(slot, hypotheses)
    if is_broken:
        return SearchOutcome(slot, (), "the model's logits are not finite; load it in a wider precision")
    return SearchOutcome(slot, (), "the search options banned every token, so no hypothesis exists")
