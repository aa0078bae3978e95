"""What is read of the results on the device: mixed lengths and numbers of hypotheses, broken sentences, none at all."""

from __future__ import annotations

import numpy as np
import pytest

from engine.search.outcomes import outcomes
from kernels.beam_search.tables import BROKEN, CLOSED, FIRST_TOKEN

NUM_POSITIONS = 20


@pytest.mark.parametrize("num_sentences", [1, 5, 61])
@pytest.mark.parametrize("most", [1, 4, 8])
def test_hypotheses_are_those_of_the_table(num_sentences: int, most: int) -> None:
    generator = np.random.default_rng(num_sentences * most)
    num_slots = num_sentences + 3
    results = generator.integers(-9, 1 << 30, (most, num_slots, FIRST_TOKEN + NUM_POSITIONS)).astype(np.int32)
    scores = generator.normal(size=(most, num_slots)).astype(np.float32)
    results[:, :, 0], results[:, :, 1] = 0, scores.view(np.int32)
    slots = generator.permutation(num_slots)[:num_sentences].tolist()
    limits = generator.integers(1, most + 1, num_sentences).tolist()
    limits[0] = most
    status = np.full(num_slots, CLOSED, dtype=np.int32)
    expected = []
    for slot, limit in zip(slots, limits, strict=True):
        status[slot] = generator.choice([CLOSED, CLOSED, CLOSED, BROKEN])
        found = int(generator.integers(0, most + 1))
        results[:found, slot, 0] = generator.integers(1, NUM_POSITIONS + 1, found)
        tokens = [tuple(line[FIRST_TOKEN : FIRST_TOKEN + line[0]].tolist()) for line in results[: min(found, limit), slot]]
        hypotheses = [] if status[slot] == BROKEN else list(zip(tokens, scores[:, slot].tolist(), strict=False))
        expected.append((slot, hypotheses))
    given = outcomes(results, slots, limits, status)
    assert [(one.source_slot, [(h.token_ids, h.score) for h in one.hypotheses]) for one in given] == expected
    assert all(type(token) is int for one in given for h in one.hypotheses for token in h.token_ids)
    assert all((one.failure is None) == bool(one.hypotheses) for one in given)


def test_a_sentence_without_hypotheses_says_why() -> None:
    results, status = np.zeros((1, 2, 9), dtype=np.int32), np.array([CLOSED, BROKEN], dtype=np.int32)
    banned, broken = outcomes(results, [0, 1], [1, 1], status)
    assert "banned every token" in str(banned.failure)
    assert "not finite" in str(broken.failure)
