"""Learnt lengths: better than the pair's own mean and than everybody's, bounded, fading, the same after a restart."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from app.cost.lengths import RATIOS, LengthsError, PairLengths, PairTraffic
from engine import demo
from engine.demo.evaluation import read_heldout
from engine.tokenizer import Tokenizer

LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan", "zho_Hans", "tur_Latn", "rus_Cyrl")
PAIRS = [f"{s}-{t}" for s in LANGUAGES for t in LANGUAGES if s != t]


def world(rng: np.random.Generator) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """True fertility and length ratio of every pair, and how many sentences each one sends: from 2 to thousands."""
    source = {language: rng.lognormal(np.log(0.3), 0.3) for language in LANGUAGES}
    size = {language: rng.lognormal(0, 0.15) for language in LANGUAGES}
    truth = {}
    for pair in PAIRS:
        s, t = pair.split("-")
        truth[pair] = (source[s] * rng.lognormal(0, 0.08), size[t] / size[s] * rng.lognormal(0, 0.05))
    counts = (4000 / np.arange(1, len(PAIRS) + 1) ** 1.8).astype(int) + 2
    return truth, dict(zip(rng.permutation(PAIRS).tolist(), counts.tolist(), strict=True))


def sentences(rng: np.random.Generator, fertility: float, ratio: float, count: int) -> list[PairTraffic]:
    """Single sentences of 5 to 500 characters, with about the noise of interface texts."""
    chars = np.clip(rng.lognormal(4, 0.8, count), 5, 500)
    source = np.maximum(rng.normal(fertility * chars, 0.6 * np.sqrt(chars)), 1.0)
    target = np.maximum(rng.normal(ratio * source, 0.8 * np.sqrt(source)), 0.0)
    return [PairTraffic(*row) for row in zip(chars.tolist(), source.tolist(), target.tolist(), strict=True)]


def test_shrunk_means_beat_own_means_and_everybodys_on_texts_to_come() -> None:
    errors = np.zeros((3, 2))  # shrunk, own, all: fertility, length ratio
    for seed in range(6):
        rng = np.random.default_rng(seed)
        truth, counts = world(rng)
        lengths = PairLengths()
        for pair, count in counts.items():
            for sentence in sentences(rng, *truth[pair], count):
                lengths.observe(0.0, {pair: sentence})
        everybody = [float(lengths._sums[ratio][:, 1].sum() / lengths._sums[ratio][:, 0].sum()) for ratio in RATIOS]
        for pair in PAIRS:
            held_out = sentences(rng, *truth[pair], 400)
            chars, source, target = np.sum([(s.source_chars, s.source_tokens, s.target_tokens) for s in held_out], axis=0)
            seen = np.array([source / chars, target / source])
            found = lengths.estimate(pair)
            for row, guess in enumerate(((found.fertility, found.length_ratio), lengths.raw(pair), everybody)):
                errors[row] += (np.array(guess) / seen - 1) ** 2
    shrunk, own, all_pairs = errors
    assert (shrunk < 0.9 * own).all()
    assert (shrunk < 0.5 * all_pairs).all()


def test_on_real_texts_too() -> None:
    """Held-out interface texts of the demonstration model: 2 to 300 a pair to learn from, the rest to judge by."""
    tokenizer = Tokenizer.from_checkpoint(Path(demo.__file__).parent / "checkpoint")
    groups = [group["texts"] for group in read_heldout() if group["kind"] == "interface"]
    count = functools.cache(lambda text, language: len(tokenizer.encode(text, language)))
    rng = np.random.default_rng(0)
    lengths, judged = PairLengths(), {}
    pairs = [(s, t) for s in tokenizer.languages[:8] for t in tokenizer.languages[:8] if s != t]
    for rank, (s, t) in enumerate(rng.permutation(pairs).tolist()):
        texts = [(len(g[s]), count(g[s], s), count(g[t], t)) for g in groups if s in g and t in g]
        texts = rng.permutation(texts).astype(float).tolist()
        num_seen = min(2 + int(300 / (1 + rank) ** 1.2), len(texts) // 2)
        for text in texts[:num_seen]:
            lengths.observe(0.0, {f"{s}-{t}": PairTraffic(*text)})
        chars, source, target = np.sum(texts[num_seen:], axis=0)
        judged[f"{s}-{t}"] = np.array([source / chars, target / source])
    everybody = np.mean(list(judged.values()), axis=0)
    errors = np.zeros((3, 2))
    for pair, seen in judged.items():
        found = lengths.estimate(pair)
        for row, guess in enumerate(((found.fertility, found.length_ratio), lengths.raw(pair), everybody)):
            errors[row] += (np.array(guess) / seen - 1) ** 2
    assert (errors[0] < 0.6 * errors[1]).all()
    assert (errors[0] < 0.6 * errors[2]).all()


def test_a_pair_seen_three_times_does_not_swing_and_a_busy_one_speaks_for_itself() -> None:
    rng = np.random.default_rng(0)
    lengths = PairLengths()
    for pair in PAIRS[:12]:
        for sentence in sentences(rng, 0.3 * rng.lognormal(0, 0.1), 1.0, 500):
            lengths.observe(0.0, {pair: sentence})
    rare = PAIRS[0].replace("eng_Latn-", "eng_Latn-x")
    for _ in range(3):
        lengths.observe(0.0, {rare: PairTraffic(10.0, 9.0, 9.0)})  # three short texts of names: 0.9 tokens a character
    assert lengths.raw(rare)[0] == pytest.approx(0.9)
    assert lengths.estimate(rare).fertility < 0.5
    assert lengths.estimate(rare).fertility_trust < 0.5
    busy = lengths.estimate(PAIRS[0])
    assert busy.fertility == pytest.approx(lengths.raw(PAIRS[0])[0], rel=0.01)
    assert busy.fertility_trust > 0.9


def test_unseen_pairs_are_like_their_language_and_unseen_languages_like_all() -> None:
    lengths = PairLengths()
    with pytest.raises(LengthsError, match="no translation was seen"):
        lengths.estimate("a-b")
    rng = np.random.default_rng(1)
    for source, fertility in (("a", 0.2), ("b", 0.8), ("c", 0.5)):
        for target in "xyz":
            for sentence in sentences(rng, fertility, 1.1, 50):
                lengths.observe(0.0, {f"{source}-{target}": sentence})
    assert lengths.estimate("a-new").fertility == pytest.approx(0.2, rel=0.1)
    assert lengths.estimate("b-new").fertility == pytest.approx(0.8, rel=0.1)
    assert lengths.estimate("new-x").fertility == pytest.approx(0.5, rel=0.1)
    assert lengths.estimate("new-x").fertility_trust == 0.0
    assert lengths.estimate("a-x").tokens(100) == pytest.approx((20, 22), rel=0.1)


def test_batches_say_the_same_mean_as_their_sentences() -> None:
    """Sums per minute instead of sentences: the same pairs, the same estimates within what batching hides of the noise."""
    rng = np.random.default_rng(2)
    single, batched = PairLengths(), PairLengths()
    for pair in PAIRS:
        fertility = 0.3 * rng.lognormal(0, 0.2)
        for _ in range(20):
            batch = sentences(rng, fertility, 1.0, int(rng.integers(1, 9)))
            for sentence in batch:
                single.observe(0.0, {pair: sentence})
            rows = np.array([(s.source_chars, s.source_tokens, s.target_tokens) for s in batch]).sum(0)
            batched.observe(0.0, {pair: PairTraffic(*rows.tolist())})
    for pair in PAIRS:
        assert batched.raw(pair) == pytest.approx(single.raw(pair))
        assert batched.estimate(pair).fertility == pytest.approx(single.estimate(pair).fertility, rel=0.02)


def test_old_traffic_fades_and_noise_stays_what_it_is() -> None:
    rng = np.random.default_rng(4)
    fading, whole = PairLengths(half_life_s=3600.0), PairLengths()
    for second in range(0, 40 * 3600, 60):
        truth = 0.3 if second < 20 * 3600 else 0.45
        batch = {pair: sentences(rng, truth, 1.0, 1)[0] for pair in PAIRS[:6]}
        fading.observe(float(second), batch)
        whole.observe(float(second), batch)
    assert fading.estimate(PAIRS[0]).fertility == pytest.approx(0.45, rel=0.03)
    assert whole.estimate(PAIRS[0]).fertility == pytest.approx(0.375, rel=0.05)
    # the noise of a sentence, from faded sums: 0.6 tokens per square root of a character
    sums = fading._sums["fertility"]
    within = (sums[:, 2] - sums[:, 1] ** 2 / sums[:, 0]).sum() / (sums[:, 3] - sums[:, 4] / sums[:, 0]).sum()
    assert within == pytest.approx(0.6**2, rel=0.2)


def test_memory_is_bounded_and_the_least_seen_goes() -> None:
    lengths = PairLengths(max_pairs=3)
    for number, chars in enumerate((50.0, 5.0, 80.0, 60.0, 7.0)):
        lengths.observe(0.0, {f"a-{number}": PairTraffic(chars, chars / 4, chars / 4)})
    assert lengths.pairs == ("a-0", "a-2", "a-3")
    forgetful = PairLengths(half_life_s=10.0)
    forgetful.observe(0.0, {"a-b": PairTraffic(100.0, 25.0, 25.0)})
    forgetful.observe(1e6, {})
    assert forgetful.pairs == ()


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    rng = np.random.default_rng(5)
    batches = [
        {pair: sentences(rng, 0.3, 1.1, 1)[0] for pair in rng.permutation(PAIRS)[: rng.integers(1, 5)]} for _ in range(60)
    ]
    one, two = PairLengths(7200.0, 8), PairLengths(7200.0, 8)
    for index, batch in enumerate(batches):
        one.observe(60.0 * index, batch)
        two.observe(60.0 * index, batch)
        if index % 7 == 0:
            two.save(path)
            two = PairLengths.load(path)
    assert one.pairs == two.pairs
    assert [one.estimate(pair) for pair in one.pairs] == [two.estimate(pair) for pair in one.pairs]


def test_bad_input_is_named(tmp_path: Path) -> None:
    lengths = PairLengths()
    for values in ((-1.0, 1.0, 1.0), (1.0, float("nan"), 1.0)):
        with pytest.raises(LengthsError, match="at least 0"):
            PairTraffic(*values)
    with pytest.raises(LengthsError, match="source-target"):
        lengths.observe(0.0, {"german": PairTraffic(1.0, 1.0, 1.0)})
    assert lengths.pairs == ()
    with pytest.raises(LengthsError, match="half_life_s"):
        PairLengths(half_life_s=0.0)
    lengths.observe(0.0, {"a-b": PairTraffic(9.0, 3.0, 3.0), "a-c": PairTraffic(0.0, 0.0, 0.0)})
    assert lengths.pairs == ("a-b",)
    path = tmp_path / "lengths.json"
    lengths.save(path)
    good = json.loads(path.read_text())
    for change, message in (
        ({"babelephant_lengths": 7}, "version 7"),
        ({"pairs": {"a-b": {"fertility": [1, 2]}}}, "no learnt lengths"),
        ({"pairs": {"a-b": {"fertility": [-1, 2, 3, 4, 5], "length_ratio": [1, 2, 3, 4, 5]}}}, "no learnt lengths"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(LengthsError, match=message):
            PairLengths.load(path)
    path.write_text("{")
    with pytest.raises(LengthsError, match="babelephant demand"):
        PairLengths.load(path)
