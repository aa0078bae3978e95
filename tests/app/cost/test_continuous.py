"""The engine replayed on paper, against a plain twin and the fit of a profile against made-up engines."""

from __future__ import annotations

import numpy as np
import pytest

from app.cost.continuous import Sentences, max_rate_per_s, replay_engine
from app.cost.profile import Birth, Profile, ProfileError, fit_costs
from app.engine_timing import CpuClock, EncodeTiming, StepTiming, fit_profile
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
    }
    return Profile(**{**fields, **changes})  # type: ignore[arg-type]


def test_one_sentence_alone_takes_its_encoder_pass_and_its_steps() -> None:
    latency = replay_engine(profile(host_s=0.005), CONFIG, Sentences(np.array([7]), np.array([3])), np.array([2.0]))
    steps = sum(0.02 + 2 * 0.003 + 2 * position * 0.0001 for position in range(3))
    assert latency[0] == pytest.approx(0.005 + 0.01 + 7 * 0.001 + steps)


def test_equal_sentences_at_once_run_in_groups_of_the_slots() -> None:
    """Twelve sentences, four slots: three groups, one after the other, by hand."""
    sentences = Sentences(np.full(12, 5), np.full(12, 4))
    latency = replay_engine(profile(), CONFIG, sentences, np.zeros(12))
    group = 0.01 + 20 * 0.001 + sum(0.02 + 8 * 0.003 + 8 * position * 0.0001 for position in range(4))
    np.testing.assert_allclose(latency, np.repeat([1, 2, 3], 4) * group)
    assert max_rate_per_s(profile(), CONFIG, sentences) == pytest.approx(4 / group)


def test_a_late_sentence_joins_between_two_steps() -> None:
    sentences = Sentences(np.array([5, 5]), np.array([10, 1]))
    latency = replay_engine(profile(beta_s=0.0), CONFIG, sentences, np.array([0.0, 0.02]))
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


def test_a_made_up_engine_is_recovered_from_its_timings() -> None:
    rng = np.random.default_rng(1)
    noise = lambda: rng.lognormal(0, 0.02)  # noqa: E731
    encodes = [
        EncodeTiming(b, s, (0.005 + 8e-5 * b * s + 2e-7 * b * s * s) * noise())
        for b in (1, 4, 16)
        for s in (8, 24, 64)
        for _ in range(8)
    ]
    steps = [
        StepTiming(rows, rows * p, (0.003 + 1e-4 * rows + 3e-6 * rows * p) * noise())
        for rows in (4, 16, 64, 128)
        for p in range(2, 40)
    ]
    found = fit_profile(
        encodes, steps, device="d", model="m", config=EngineConfig(precision="w8a16"), beam_size=4, startup_s=1.0, host_s=0.0
    )
    truth = {"a0_s": 0.005, "a1_s": 8e-5, "a2_s": 2e-7, "tau0_s": 0.003, "alpha_s": 1e-4, "beta_s": 3e-6}
    for name, value in truth.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.15), name
        assert abs(getattr(found, name) - value) < 4 * found.errors[name], name
    assert found.max_batch == 32
    assert found.step_s(64, 64 * 20) == pytest.approx(0.003 + 64e-4 + 3e-6 * 64 * 20, rel=0.03)
    assert found.step_s(40) == pytest.approx(0.003 + 40e-4, rel=0.03)  # between two points
    assert found.step_s(256) == pytest.approx(0.003 + 256e-4, rel=0.05)  # beyond the last


def test_costs_are_never_negative() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    coefficients, errors = fit_costs(np.stack([np.ones(5), x, x**2], 1), 2 * x - 0.5)
    assert coefficients.min() >= 0
    assert errors[coefficients == 0].max() == 0
    with pytest.raises(ProfileError, match="sizes"):
        fit_costs(np.ones((5, 2)), np.ones(5))


def test_waiting_costs_no_cpu_time() -> None:
    clock = CpuClock()
    before = clock.now()
    clock.wait(100.0)
    assert 100.0 <= clock.now() - before < 101.0
