"""Packing sentences for one encoder pass: no padding, one offset per sentence. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.types import EncodedBatch, Int32Array


def pack(sources: Sequence[Int32Array], source_slots: Sequence[int]) -> EncodedBatch:
    """Lay sentences (int32 token ids) end to end, shortest first: equal lengths side by side share one attention call.

    Raises ValueError for no sentence, an empty one, or another number of slots.
    """
    if not sources or min(len(source) for source in sources) == 0:
        raise ValueError("an encoder pass needs at least one sentence, and at least one token in each")
    by_length = sorted(zip(sources, source_slots, strict=True), key=lambda pair: len(pair[0]))
    offsets = np.zeros(len(by_length) + 1, dtype=np.int32)
    np.cumsum([len(source) for source, _ in by_length], out=offsets[1:])
    token_ids = np.concatenate([source for source, _ in by_length]).astype(np.int32)
    return EncodedBatch(token_ids, offsets, np.array([slot for _, slot in by_length], dtype=np.int32))
