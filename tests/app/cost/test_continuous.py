"""The engine replayed on paper, against a plain twin and the fit of a profile against made-up engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app.clocks import CpuClock
from app.cost.continuous import Sentences, max_rate_per_s, replay_engine
from app.cost.profile import PARAMETERS, Birth, Profile, ProfileError, cells_read, fit_costs
from app.engine_profile import fit_profile
from app.engine_timing import Timing
from engine.config import EngineConfig

CONFIG = EngineConfig(precision="w8a16", max_rows=8, max_source_slots=4)


def profile(**changes: object) -> Profile:
    fields = {
        "device": "d",
        "model": "m",
        "precision": "w8a16",
        "beam_size": 2,
        "estimated": False,
        "a0_s": 0.01,
        "a1_s": 0.001,
        "a2_s": 0.0,
        "tau0_s": 0.02,
        "alpha_s": 0.003,
        "startup_s": 1.0,
        "memory_bytes": 1.0,
        "max_batch": 4,
        "born": Birth("2026-11-26", "c", "m", "t"),
        "errors": {},
        "beta_s": 0.0001,
        "gamma_s": 0.00001,
    }
    return Profile(**{**fields, **changes})  # type: ignore[arg-type]


def test_one_sentence_alone_takes_its_encoder_pass_and_its_steps() -> None:
    case = profile(host_s=0.005)
    latency = replay_engine(case, CONFIG, Sentences(np.array([7]), np.array([3])), np.array([2.0]))
    steps = sum(0.02 + 2 * 0.003 + 2 * held * 0.0001 + 7 * 0.00001 for held in (2, 3, 4))
    assert latency[0] == pytest.approx(0.005 + 0.01 + 7 * 0.001 + steps)


def test_equal_sentences_at_once_run_in_groups_of_the_slots() -> None:
    """Twelve sentences, four slots: three groups, one after the other, by hand."""
    sentences = Sentences(np.full(12, 5), np.full(12, 4))
    latency = replay_engine(profile(), CONFIG, sentences, np.zeros(12))
    group = 0.01 + 20 * 0.001 + sum(0.02 + 8 * 0.003 + 8 * held * 0.0001 + 20 * 0.00001 for held in (2, 3, 4, 5))
    np.testing.assert_allclose(latency, np.repeat([1, 2, 3], 4) * group)
    assert max_rate_per_s(profile(), CONFIG, sentences) == pytest.approx(4 / group)


def test_an_engine_that_pads_reads_as_much_for_all_as_for_the_longest() -> None:
    assert cells_read(3, 20.0, 9.0, 0) == 20
    assert cells_read(3, 20.0, 9.0, 4) == 3 * 12
    assert cells_read(3, 20.0, 8.0, 4) == 3 * 8
    sentences = Sentences(np.array([5, 11]), np.array([2, 2]))
    latency = replay_engine(profile(length_step=16), CONFIG, sentences, np.zeros(2))
    step = 0.02 + 4 * 0.003 + 4 * 16 * 0.0001 + 2 * 16 * 0.00001
    np.testing.assert_allclose(latency, 0.01 + 16 * 0.001 + 2 * step)


def test_a_step_in_which_sentences_end_takes_longer_however_many() -> None:
    sentences = Sentences(np.array([5, 5, 5]), np.array([2, 2, 3]))
    plain = replay_engine(profile(), CONFIG, sentences, np.zeros(3))
    latency = replay_engine(profile(ending_s=0.5), CONFIG, sentences, np.zeros(3))
    np.testing.assert_allclose(latency - plain, [0.5, 0.5, 1.0])


def test_a_late_sentence_joins_between_two_steps() -> None:
    sentences = Sentences(np.array([5, 5]), np.array([10, 1]))
    latency = replay_engine(profile(beta_s=0.0, gamma_s=0.0), CONFIG, sentences, np.array([0.0, 0.02]))
    first_step_ends = 0.015 + 0.026
    assert latency[1] == pytest.approx(first_step_ends + 0.015 + 0.032 - 0.02)
    assert latency[0] == pytest.approx(2 * 0.015 + 9 * 0.026 + 0.032)


def test_more_load_waits_longer() -> None:
    rng = np.random.default_rng(0)
    sentences = Sentences(rng.integers(3, 20, 300), rng.integers(2, 20, 300))
    most = max_rate_per_s(profile(), CONFIG, sentences)
    p99 = [
        np.quantile(replay_engine(profile(), CONFIG, sentences, rng.exponential(1 / (load * most), 300).cumsum()), 0.99)
        for load in (0.2, 0.6, 1.5)
    ]
    assert p99[0] < p99[1] < p99[2]


def test_bad_sentences_are_refused() -> None:
    for tokens, steps in (([1, 2], [1]), ([0], [1]), ([1], [0])):
        with pytest.raises(ValueError, match="positive"):
            Sentences(np.array(tokens), np.array(steps))


def made_up_timings(truth: dict[str, float], noise: float, group: int = 1) -> list[Timing]:
    """Of `group` steps each; single ones have their encoder passes timed apart, and show what starts and ends in them."""
    rng = np.random.default_rng(1)
    timings = []
    for _ in range(1200 if group == 1 else 560):  # as many as a real measurement has
        rows = rng.choice([4, 8, 20, 64, 128], group)
        passes = tuple(tuple(rng.integers(3, 60, rng.integers(1, 9)).tolist()) for _ in range(group) if rng.random() < 0.4)
        cells = (rows * rng.integers(2, 60, group)).astype(np.float64)
        source_cells = float(rows.sum() * rng.integers(2, 12))
        seconds = truth["tau0_s"] * group + truth["alpha_s"] * rows.sum()
        seconds += truth["beta_s"] * cells.sum() + truth["gamma_s"] * source_cells
        pass_s, count = 0.0, sum(map(len, passes))
        for lengths in passes:
            pass_s += truth["a0_s"] + truth["a1_s"] * sum(lengths) + truth["a2_s"] * sum(s * s for s in lengths)
        pass_s += truth["host_s"] * count
        if group == 1:
            num_ended = int(rng.choice([0, 1, 5]))
            seconds += 0.0004 * num_ended + 0.0007 * (num_ended > 0) + 0.0003 * count + 0.002 * len(passes)
            if passes:
                timings.append(Timing((), (), 0.0, passes, pass_s * rng.lognormal(0, noise)))
            step = Timing(
                tuple(rows.tolist()),
                tuple(cells.tolist()),
                source_cells,
                (),
                seconds * rng.lognormal(0, noise),
                count,
                num_ended,
            )
        else:
            seconds = (seconds + pass_s) * rng.lognormal(0, noise)
            step = Timing(tuple(rows.tolist()), tuple(cells.tolist()), source_cells, passes, seconds)
        timings.append(step)
    return timings


@pytest.mark.parametrize(("group", "length_step"), [(1, 16), (16, 0)])
def test_a_made_up_engine_is_recovered_from_its_timings(group: int, length_step: int) -> None:
    truth = {"a0_s": 0.005, "a1_s": 8e-5, "a2_s": 2e-6, "tau0_s": 0.003, "alpha_s": 1e-4, "beta_s": 3e-6, "gamma_s": 2e-6}
    truth["host_s"] = 6e-4
    config = EngineConfig(precision="w8a16")
    found = fit_profile(
        made_up_timings(truth, 0.02, group),
        device="d",
        model="m",
        config=config,
        beam_size=4,
        length_step=length_step,
        startup_s=1.0,
        host_s=0.001,
    )
    truth["host_s"] += 0.001
    truth["ending_s"] = 0.0
    if group == 1:
        truth["ending_s"] = 0.0007
        truth["host_s"] += 0.0003 + 0.0004
        truth["a0_s"] += 0.002
    for name in PARAMETERS:
        assert abs(getattr(found, name) - truth[name]) < 4 * found.errors[name] + 1e-9, name
        assert found.errors[name] < truth[name] + 1e-9, name
    assert (found.max_batch, found.length_step) == (32, length_step)
    assert found.step_s(64, 64 * 20, 64 * 6) == pytest.approx(0.003 + 64e-4 + 3e-6 * 64 * 20 + 2e-6 * 64 * 6, rel=0.03)
    passes = pytest.approx(truth["a0_s"] + 50 * 8e-5 + 1300 * 2e-6, rel=0.05 if group == 1 else 0.15)
    assert found.encode_s(np.array([20.0, 30.0])) == passes
    assert found.encode_s(np.full(16, 50.0)) == pytest.approx(truth["a0_s"] + 800 * 8e-5 + 40000 * 2e-6, rel=0.1)  # beyond
    assert found.step_s(40) == pytest.approx(0.003 + 40e-4, rel=0.05)  # between two points
    assert found.step_s(256) == pytest.approx(0.003 + 256e-4, rel=0.05)  # beyond the last


def test_reading_that_spills_out_of_a_cache_and_small_passes_are_followed() -> None:
    """Twice as dear beyond 2048 cells; passes of fewer than 16 tokens touch fewer experts."""
    rng = np.random.default_rng(2)
    timings = []

    def step_s(rows: int, cells: float) -> float:
        return 0.003 + 1e-4 * rows + 3e-6 * cells + 3e-6 * max(0.0, cells - 2048)

    def pass_s(tokens: int) -> float:
        return 0.004 + 2e-4 * min(tokens, 16) + 5e-5 * tokens

    for _ in range(2000):
        rows, lengths = int(rng.choice([4, 16, 64, 128])), rng.integers(4, 40, int(rng.integers(1, 17)))
        cells = float(rows * rng.choice([16, 32, 48, 64]))
        timings.append(Timing((rows,), (cells,), 0.0, (), step_s(rows, cells) * rng.lognormal(0, 0.02)))
        seconds = (pass_s(lengths.sum()) + 2e-4 * len(lengths)) * rng.lognormal(0, 0.02)
        timings.append(Timing((), (), 0.0, (tuple(lengths.tolist()),), seconds))
    found = fit_profile(
        timings,
        device="d",
        model="m",
        config=EngineConfig(precision="w8a16"),
        beam_size=4,
        length_step=16,
        startup_s=1.0,
        host_s=0.0,
    )
    for rows, cells in ((64, 1024), (64, 2048), (128, 2048), (128, 4096), (128, 8192), (16, 256)):
        assert found.step_s(rows, cells) == pytest.approx(step_s(rows, cells), rel=0.02)
    for lengths in ([4.0], [16.0], [30.0, 34.0], [32.0] * 8):
        seconds = found.encode_s(np.array(lengths)) + len(lengths) * found.host_s
        assert seconds == pytest.approx(pass_s(int(sum(lengths))) + 2e-4 * len(lengths), rel=0.03)


def test_noise_does_not_make_an_engine_look_faster() -> None:
    """Weights from the timings themselves would favour the short ones: 9 % too low at this noise."""
    rng = np.random.default_rng(3)
    size = rng.integers(1, 50, 4000).astype(np.float64)
    seconds = (2.0 + 0.1 * size) * rng.choice([0.7, 1.3], 4000)
    (intercept, slope), errors = fit_costs(np.stack([np.ones(4000), size], 1), seconds)
    assert intercept + slope * 25 == pytest.approx(4.5, rel=0.015)
    assert abs(slope - 0.1) < 4 * errors[1]


def test_costs_are_never_negative() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    coefficients, errors = fit_costs(np.stack([np.ones(5), x, x**2], 1), 2 * x - 0.5)
    assert coefficients.min() >= 0
    assert errors[coefficients == 0].max() == 0
    with pytest.raises(ProfileError, match="sizes"):
        fit_costs(np.ones((5, 2)), np.ones(5))


def test_a_profile_from_before_endings_were_measured_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile(ending_s=0.001).save(path)
    assert Profile.load(path).ending_s == 0.001
    raw = json.loads(path.read_text())
    del raw["ending_s"]
    path.write_text(json.dumps(raw))
    assert Profile.load(path) == profile()
    del raw["host_s"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ProfileError, match="host_s missing"):
        Profile.load(path)


def test_waiting_costs_no_cpu_time() -> None:
    clock = CpuClock()
    before = clock.now()
    clock.wait(100.0)
    assert 100.0 - 1e-9 <= clock.now() - before < 101.0  # rounding may take a little away
