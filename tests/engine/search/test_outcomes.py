"""Finished hypotheses read back from the tables: one by one, side by side, and against a search that keeps its prefixes."""

from __future__ import annotations

import numpy as np
import pytest

from engine.search import outcomes
from engine.search.outcomes import Finished, outcome, trace

NUM_POSITIONS = 20


class Fleet:
    """Sentences with random paths: history as the device leaves it, and the same prefixes as lists."""

    def __init__(self, seed: int, num_sentences: int) -> None:
        generator = np.random.default_rng(seed)
        beams = generator.integers(1, 9, num_sentences)
        rows = generator.permutation(int(beams.sum()) + 3)
        slots = generator.permutation(num_sentences + 2)
        self.history = generator.integers(-9, 1 << 30, (len(rows), NUM_POSITIONS, 2)).astype(np.int32)
        self.hypotheses = generator.integers(-9, 9, (len(slots), 8, 4)).astype(np.int32)
        self.hypotheses[:, :, 0] = 0
        self.hypotheses[:, :, 3] = generator.integers(0, NUM_POSITIONS, self.hypotheses.shape[:2])
        self.scores = generator.normal(size=(len(slots), 8)).astype(np.float32)
        self.expected = []
        self.finished = Finished(slots[:num_sentences], beams, np.ones_like(beams), np.full((num_sentences, 8), rows[-1]))
        taken = 0
        for s, count in enumerate(beams.tolist()):
            own, slot = rows[taken : taken + count], int(slots[s])
            taken += count
            wanted = int(generator.integers(1, count + 1))
            self.finished.limits[s] = wanted
            self.finished.rows[s, :count] = own
            forced = int(generator.integers(1 << 30))
            prefixes = [[forced]] * count
            self.history[own, 1] = forced, 0
            for t in range(2, NUM_POSITIONS):
                parents, tokens = generator.integers(0, count, count), generator.integers(0, 1 << 30, count)
                self.history[own, t] = np.stack([tokens, parents], 1)
                prefixes = [[*prefixes[p], int(token)] for p, token in zip(parents, tokens, strict=True)]
                # a sentence's paths are read at one length each: keep those that end here
                place = t - 2
                if place < count and generator.random() < 0.9:
                    self.hypotheses[slot, place] = 0, generator.integers(count), generator.integers(1 << 30), t + 1
                    self._paths(slot)[place] = prefixes
            done = int(generator.integers(0, count + 1))
            found = []
            for place in range(done):
                if place not in self._paths(slot):
                    break
                _, beam, last, length = self.hypotheses[slot, place].tolist()
                self.hypotheses[slot, place, 0] = 1
                found.append(([*self._paths(slot)[place][beam], last], float(self.scores[slot, place])))
                assert len(found[-1][0]) == length
            self.expected.append(found[:wanted])

    def _paths(self, slot: int) -> dict[int, list[list[int]]]:
        if not hasattr(self, "_kept"):
            self._kept: dict[int, dict[int, list[list[int]]]] = {}
        return self._kept.setdefault(slot, {})


@pytest.mark.parametrize("num_sentences", [1, 5, 16, 61])
@pytest.mark.parametrize("side_by_side_from", [1, 1000])
def test_paths_are_those_of_the_search(num_sentences: int, side_by_side_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "_SIDE_BY_SIDE", side_by_side_from)
    fleet = Fleet(num_sentences, num_sentences)
    found = trace(fleet.history, fleet.hypotheses, fleet.scores, fleet.finished)
    assert [[(list(h.token_ids), h.score) for h in one] for one in found] == fleet.expected
    assert all(type(token) is int for one in found for h in one for token in h.token_ids)


def test_no_sentence_at_all() -> None:
    fleet, none = Fleet(0, 2), np.zeros((0, 8), dtype=np.int32)
    nobody = Finished(none[:, 0], none[:, 0], none[:, 0], none)
    assert trace(fleet.history, fleet.hypotheses, fleet.scores, nobody) == []


def test_a_sentence_without_hypotheses_says_why() -> None:
    assert "banned every token" in str(outcome(3, [], is_broken=False).failure)
    assert "not finite" in str(outcome(3, [], is_broken=True).failure)
