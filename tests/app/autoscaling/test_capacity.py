"""Capacity from a profile and learnt lengths, against the same figure worked out from the sentences themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.serve._private.common import TimeStampedValue

from app.autoscaling.capacity import ReplicaCapacity, check_files
from app.autoscaling.feed import PoolSnapshot
from app.autoscaling.pair_counts import MAX_PAIRS, OTHERS, PairCounter, PairMeter
from app.autoscaling.settings import AutoscalingSettings
from app.cost.lengths import LengthsError, PairLengths
from app.cost.profile import Birth, Profile, ProfileError
from engine.types import FinishReason, Hypothesis, Timings, Translation, TranslationRequest

Sentence = tuple[str, int, int, int]  # pair, characters, source and target tokens


def profile(path: Path, device: str = "d") -> Profile:
    made = Profile(device, "m", "w8a16", 4, False, 0.002, 1e-5, 0.0, 0.004, 1e-4, 60.0, 1e9, 32, Birth("", "", "", ""), {})
    made.save(path)
    return made


def settings(tmp_path: Path, **more: Any) -> AutoscalingSettings:
    start = {"source_tokens": 20, "target_tokens": 22, "slo_s": 1.5}
    pools = {
        "fixed": {"capacity_per_s": 7, "startup_s": 5},
        "learning": {"profile": str(tmp_path / "profile.json"), "startup_s": 60, **start},
    }
    return AutoscalingSettings.model_validate({"pools": pools, **more})


def request(sentence: Sentence) -> TranslationRequest:
    source, target = sentence[0].split("-")
    return TranslationRequest("r", "x" * sentence[1], source, target)


def translation(sentence: Sentence) -> Translation:
    found = Hypothesis("t", tuple(range(sentence[3])), 0.0)
    return Translation("r", (found,), sentence[2], FinishReason.EOS, Timings(0, 0, 0))


class Replica:
    """Counts as app.replica does, and keeps what it reported."""

    def __init__(self) -> None:
        self.counter, self.points = PairCounter(), dict[str, list[TimeStampedValue]]()

    def serve(self, sentences: list[Sentence], refused: int = 0) -> None:
        """The last `refused` of them are offered and not finished."""
        self.counter.offered(map(request, sentences))
        done = sentences[: len(sentences) - refused]
        self.counter.finished(list(map(request, done)), list(map(translation, done)))

    def report(self, time_s: float) -> None:
        for name, value in self.counter.report().items():
            self.points.setdefault(name, []).append(TimeStampedValue(time_s, value))


def snapshot(replicas: dict[str, Replica], time_s: float) -> PoolSnapshot:
    series: dict[str, dict[str, list[TimeStampedValue]]] = {}
    for name, replica in replicas.items():
        for metric, points in replica.points.items():
            series.setdefault(metric, {})[name] = points
    return PoolSnapshot(time_s, tuple(replicas), len(replicas), 1, 9, 0.0, series)


def draw(rng: np.random.Generator, count: int, fertility: dict[str, float]) -> list[Sentence]:
    made = []
    for pair in rng.choice(list(fertility), count).tolist():
        chars = int(rng.integers(10, 150))
        source = max(1, round(chars * fertility[pair] * rng.lognormal(0, 0.1)))
        made.append((pair, chars, source, max(1, round(source * 1.2))))
    return made


def test_increases_add_up_to_what_was_counted_over_the_lives_of_replicas() -> None:
    rng = np.random.default_rng(0)
    fertility = {f"a{i}-b": 0.2 + 0.01 * i for i in range(MAX_PAIRS + 9)}
    replicas, meter, total, served = {"r0": Replica()}, PairMeter(), np.zeros(5), np.zeros(5)
    for tick in range(60):
        if tick % 17 == 16:
            replicas[f"r{tick}"] = Replica()
            replicas[f"r{tick}"].report(float(tick))  # as Serve does, before the first request
            meter.read(replicas, snapshot(replicas, 0.0).series)
        if tick == 42:  # just after a report, so nothing is lost
            del replicas["r0"]
        for replica in replicas.values():
            sentences = draw(rng, 5, fertility)
            refused = int(rng.integers(0, 3))
            replica.serve(sentences, refused)
            if tick:  # the first look is where counting begins
                served += [
                    len(sentences),
                    sum(s[1] for s in sentences),
                    *np.sum([s[1:] for s in sentences[: 5 - refused]], axis=0),
                ]
            if tick % 3 or tick == 0:  # a report may be missed
                replica.report(float(tick))
        increases = meter.read(replicas, snapshot(replicas, float(tick)).series)
        assert len(increases) <= 3 * (MAX_PAIRS + 1)
        for each in increases.values():
            done = each.finished
            total += [each.offered_sentences, each.offered_chars, done.source_chars, done.source_tokens, done.target_tokens]
    assert OTHERS in increases
    np.testing.assert_allclose(total, served)


def test_the_first_look_takes_no_past_for_present() -> None:
    replica = Replica()
    replica.serve([("a-b", 100, 30, 30)] * 50)
    replica.report(0.0)
    meter = PairMeter()
    first = meter.read({"r": replica}, snapshot({"r": replica}, 0.0).series)
    assert first["a-b"].offered_chars == 0.0
    replica.serve([("a-b", 10, 3, 4)])
    replica.report(1.0)
    assert meter.read({"r": replica}, snapshot({"r": replica}, 1.0).series)["a-b"].finished.target_tokens == 4
    name = "pair a-b source_tokens"
    replica.points[name][-1:] = [TimeStampedValue(2.0, float("nan"))]
    assert meter.read({"r": replica}, snapshot({"r": replica}, 2.0).series) == {}
    replica.serve([("a-b", 10, 3, 4)])
    replica.report(3.0)
    assert meter.read({"r": replica}, snapshot({"r": replica}, 3.0).series)["a-b"].finished.source_tokens == 3


def test_capacity_is_the_profiles_for_the_sentences_offered(tmp_path: Path) -> None:
    measured = profile(tmp_path / "profile.json")
    capacity = ReplicaCapacity(settings(tmp_path))
    assert capacity.per_s.tolist() == [7.0, measured.capacity_per_s(20, 22, 1.5)]
    rng = np.random.default_rng(1)
    replicas = {"r0": Replica(), "r1": Replica()}
    seen = []
    for tick in range(30):
        for replica in replicas.values():
            sentences = draw(rng, 8, {"en-de": 0.5, "en-ja": 0.3, "ko-de": 0.9})
            seen += sentences if tick else []
            replica.serve(sentences, refused=2)
            replica.report(float(tick))
        capacity.observe(10.0 * tick, {"learning": snapshot(replicas, float(tick))})
    source, target = np.mean([sentence[2:] for sentence in seen], axis=0).tolist()
    assert capacity.per_s[0] == 7.0
    assert capacity.per_s[1] == pytest.approx(measured.capacity_per_s(source, target, 1.5), rel=0.12)
    assert capacity.per_s[1] < 0.7 * measured.capacity_per_s(20, 22, 1.5)
    # the mix turns to a pair with short sentences: within hours so does the capacity
    for tick in range(30, 400):
        sentences = [("en-de", 12, 6, 7)] * 40
        replicas["r0"].serve(sentences)
        replicas["r0"].report(float(tick))
        capacity.observe(300 + 60.0 * (tick - 30), {"learning": snapshot(replicas, float(tick))})
    assert capacity.per_s[1] == pytest.approx(measured.capacity_per_s(6, 7, 1.5), rel=0.12)


def test_little_traffic_and_strange_lengths_move_it_within_bounds(tmp_path: Path) -> None:
    measured = profile(tmp_path / "profile.json")
    capacity, replica = ReplicaCapacity(settings(tmp_path)), Replica()
    start = float(capacity.per_s[1])
    for tick in range(12):
        replica.serve([("en-de", 10, 1, 1)] * 9)
        replica.report(float(tick))
        capacity.observe(float(tick), {"learning": snapshot({"r": replica}, float(tick)), "fixed": snapshot({}, 0.0)})
        if tick < 11:
            assert capacity.per_s[1] == start  # fewer than 100 sentences
    for tick in range(12, 40):
        replica.serve([("en-de", 10, 1, 1)] * 90)
        replica.report(float(tick))
        capacity.observe(float(tick), {"learning": snapshot({"r": replica}, float(tick))})
    assert capacity.per_s[1] == measured.capacity_per_s(5, 5.5, 1.5)  # a quarter of where it started, not a twentieth
    capacity.observe(41.0, {})  # no snapshot of the pool


def test_an_earlier_lifes_capacity_holds_until_enough_is_seen_and_lengths_survive(tmp_path: Path) -> None:
    profile(tmp_path / "profile.json")
    chosen = settings(tmp_path, lengths_path=str(tmp_path / "state" / "lengths.json"), clock_scale=4)
    first, replica = ReplicaCapacity(chosen), Replica()
    assert first.per_s[0] == 7.0 / 4
    for tick in range(30):
        replica.serve([("en-de", 100, 60, 70)] * 20)
        replica.report(float(tick))
        first.observe(60.0 * tick, {"learning": snapshot({"r": replica}, float(tick))})
    second = ReplicaCapacity(chosen)
    second.resume(first.per_s)
    np.testing.assert_array_equal(second.per_s, first.per_s)
    assert PairLengths.load(tmp_path / "state" / "lengths.json").estimate("en-de").fertility == pytest.approx(0.6, rel=0.01)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"profile\.json"):
        check_files(settings(tmp_path))
    (tmp_path / "profile.json").write_text('{"version": 1}')
    with pytest.raises(ProfileError, match="version 1"):
        check_files(settings(tmp_path))
    profile(tmp_path / "profile.json")
    (tmp_path / "lengths.json").write_text("{}")
    with pytest.raises(LengthsError, match="no learnt lengths"):
        check_files(settings(tmp_path, lengths_path=str(tmp_path / "lengths.json")))
    pools = {"a": {"profile": str(tmp_path / "profile.json"), "startup_s": 1, "source_tokens": 9, "target_tokens": 900}}
    for use in (check_files, ReplicaCapacity):
        with pytest.raises(ValueError, match="longer than slo_s 1"):
            use(AutoscalingSettings.model_validate({"pools": pools}))
