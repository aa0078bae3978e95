"""engine.search against the plain Python reference, over a made-up decoder that reads prefixes through the ancestry."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from engine.search.search import Search
from engine.search.spec import SearchOutcome, SearchSpec
from engine.types import SearchOptions
from tests.engine.search.reference import search_reference

START = EOS = 2
MAX_TARGET_TOKENS = 14
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class PrefixDecoder:
    """A decoder whose logits depend on the whole prefix and on the source slot; it stores tokens as a cache stores keys.

    Logits are drawn from a hash, so no two are equal; unwritten cache cells are poisoned.
    """

    def __init__(self, *, seed: int, vocab_size: int, eos_bias: float, num_rows: int) -> None:
        self.seed, self.vocab_size, self.eos_bias = seed, vocab_size, eos_bias
        self.cache = np.full((num_rows, MAX_TARGET_TOKENS), -999)

    def logits_of(self, slot: int, prefix: tuple[int, ...]) -> np.ndarray:
        assert min(prefix) >= 0, "an unwritten cache cell was read"
        seed = zlib.crc32(repr((self.seed, slot, prefix)).encode())
        logits = np.random.default_rng(seed).normal(scale=2.0, size=self.vocab_size)
        logits[EOS] += self.eos_bias
        return logits.astype(np.float32)

    def step(self, search: Search) -> list[SearchOutcome]:
        inputs = search.inputs()
        tokens, positions, rows, slots, ancestry = (tensor.cpu().numpy() for tensor in inputs)
        cells = set(zip(rows.tolist(), positions.tolist(), strict=True))
        assert len(cells) == len(rows), "two live beams share a cache cell"
        self.cache[rows, positions] = tokens
        logits = []
        for r in range(len(rows)):
            assert ancestry[r, positions[r]] == rows[r]
            prefix = [int(self.cache[ancestry[r, t], t]) for t in range(positions[r] + 1)]
            logits.append(self.logits_of(int(slots[r]), tuple(prefix)))
        return search.advance(torch.from_numpy(np.stack(logits)).to(inputs.token_ids.device))


def make_search(num_rows: int, device: str = "cpu") -> Search:
    limits = {"num_rows": num_rows, "max_target_tokens": MAX_TARGET_TOKENS}
    return Search(**limits, start_token_id=START, eos_token_id=EOS, device=torch.device(device))


def draw_spec(rng: np.random.Generator, *, slot: int, free_rows: list[int], vocab_size: int) -> SearchSpec:
    beam_size = int(rng.choice([1, 2, 3, 4, 5]))
    options = SearchOptions(
        beam_size=beam_size,
        length_penalty=float(rng.choice([0.6, 1.0, 1.5, 0.0, -0.5, 2.0])),
        early_stopping=[False, True, "never"][rng.integers(3)],
        min_target_tokens=int(rng.choice([0, 0, 3, 6])),
        no_repeat_ngram_size=int(rng.choice([0, 0, 1, 2, 3])),
        num_hypotheses=int(rng.integers(1, beam_size + 1)),
    )
    rows = tuple(free_rows.pop(int(rng.integers(len(free_rows)))) for _ in range(beam_size))
    max_tokens = int(rng.integers(2, MAX_TARGET_TOKENS + 1))
    return SearchSpec(slot, rows, int(rng.integers(3, vocab_size)), max_tokens, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_mixed_sentences_arriving_at_any_step_match_the_reference(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([33, 40, 61, 2200]))  # 2200: the two-stage selection
    num_sentences = 8
    num_rows = 5 * num_sentences
    decoder = PrefixDecoder(seed=seed, vocab_size=vocab_size, eos_bias=float(rng.choice([-2, 2, 4])), num_rows=num_rows)
    search, free_rows = make_search(num_rows, device), list(range(num_rows))
    specs = [draw_spec(rng, slot=i, free_rows=free_rows, vocab_size=vocab_size) for i in range(num_sentences)]
    waiting, outcomes = list(specs), {}
    while waiting or search.num_rows:
        arrivals = [waiting.pop() for _ in range(min(len(waiting), int(rng.integers(0, 3))))]
        search.add(arrivals)
        if search.num_rows:
            outcomes.update({outcome.source_slot: outcome for outcome in decoder.step(search)})
    for spec in specs:
        expected = search_reference(
            lambda prefix, slot=spec.source_slot: decoder.logits_of(slot, prefix),
            options=spec.options,
            forced=spec.forced_token_id,
            max_tokens=spec.max_tokens,
            start=START,
            eos=EOS,
        )
        got = outcomes[spec.source_slot]
        assert got.failure is None
        assert [h.token_ids for h in got.hypotheses] == [ids for ids, _ in expected], spec
        np.testing.assert_allclose([h.score for h in got.hypotheses], [s for _, s in expected], rtol=2e-5, atol=1e-5)


def test_removed_sentences_leave_the_others_unchanged() -> None:
    decoder = PrefixDecoder(seed=5, vocab_size=40, eos_bias=0.0, num_rows=12)
    options = SearchOptions(beam_size=4)
    specs = [SearchSpec(i, tuple(range(4 * i, 4 * i + 4)), 7 + i, 12, options) for i in range(3)]
    search, outcomes = make_search(12), {}
    search.add(specs)
    for step in range(12):
        if step == 3:
            search.remove({1})
        if search.num_rows:
            outcomes.update({outcome.source_slot: outcome for outcome in decoder.step(search)})
    assert sorted(outcomes) == [0, 2]
    for slot in (0, 2):
        [(ids, _)] = search_reference(
            lambda prefix, slot=slot: decoder.logits_of(slot, prefix), options=options, forced=7 + slot, max_tokens=12
        )
        assert outcomes[slot].hypotheses[0].token_ids == ids


@pytest.mark.parametrize("beam_size", [1, 3])
def test_banning_every_token_is_a_failure_not_a_made_up_text(beam_size: int) -> None:
    decoder = PrefixDecoder(seed=1, vocab_size=6, eos_bias=0.0, num_rows=3)
    search = make_search(3)
    options = SearchOptions(beam_size=beam_size, no_repeat_ngram_size=1, length_penalty=0.0)
    search.add([SearchSpec(0, tuple(range(beam_size)), 5, 14, options)])
    outcomes: list[SearchOutcome] = []
    while search.num_rows:
        outcomes += decoder.step(search)
    assert outcomes[0].hypotheses == ()
    assert "banned every token" in str(outcomes[0].failure)


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_logits_fail_their_sentence_only(beam_size: int, poison: float) -> None:
    search = make_search(4)
    for slot in (0, 1):
        rows = tuple(range(2 * slot, 2 * slot + beam_size))
        search.add([SearchSpec(slot, rows, 9, 3, SearchOptions(beam_size=beam_size))])
    logits = torch.randn(2 * beam_size, 30, generator=torch.Generator().manual_seed(0))
    logits[0, 11] = poison
    [outcome] = search.advance(logits)
    assert outcome.source_slot == 0
    assert "not finite" in str(outcome.failure)
    assert search.num_rows == beam_size


def test_spec_refuses_a_wrong_number_of_rows() -> None:
    with pytest.raises(ValueError, match="2 rows given for beam_size 4"):
        SearchSpec(0, (1, 2), 5, 10, SearchOptions(beam_size=4))


def test_spec_refuses_a_limit_without_room() -> None:
    with pytest.raises(ValueError, match="choose 2 or more"):
        SearchSpec(0, (1,), 5, 1, SearchOptions(beam_size=1))
