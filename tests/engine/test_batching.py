"""Packing: every token once, under the right slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batching import pack


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=12), st.randoms())
def test_sentences_can_be_read_back_by_slot(sentences: list[list[int]], random: object) -> None:
    slots = list(range(100, 100 + len(sentences)))
    random.shuffle(slots)
    batch = pack([np.array(s, dtype=np.int32) for s in sentences], slots)
    assert [a.dtype for a in (batch.source_token_ids, batch.source_offsets, batch.source_slots)] == [np.int32] * 3
    bounds = zip(batch.source_offsets[:-1], batch.source_offsets[1:], batch.source_slots, strict=True)
    read = {int(slot): batch.source_token_ids[start:stop].tolist() for start, stop, slot in bounds}
    assert read == dict(zip(slots, sentences, strict=True))
    lengths = np.diff(batch.source_offsets)
    assert (np.diff(lengths) >= 0).all(), "equal lengths must lie side by side"


@pytest.mark.parametrize("sources", [[], [np.zeros(0, dtype=np.int32)]])
def test_nothing_to_encode_is_an_error(sources: list) -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack(sources, list(range(len(sources))))
