"""Schedules: reproducible, and distributed as their names say (checked against closed forms, not against themselves)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import RateProfile, draw_schedule, flat, ramp, replay_trace, steps, with_warmup
from loadtest.errors import LoadTestError

CONSTANT, POISSON = 0.0, 1.0


def counts(profile: RateProfile, dispersion: float, num_seeds: int) -> np.ndarray:
    return np.array([len(draw_schedule(profile, dispersion=dispersion, seed=seed).times_s) for seed in range(num_seeds)])


def test_one_seed_gives_one_schedule_and_another_seed_another():
    profile = ramp(2, 40, 20)
    first, again, other = (draw_schedule(profile, dispersion=3.0, seed=seed).times_s for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first[:20], other[:20])
    assert np.all(np.diff(first) >= 0)
    assert first[0] >= 0
    assert first[-1] < 20


def test_constant_arrivals_are_evenly_spaced():
    times = draw_schedule(flat(8, 5), dispersion=CONSTANT, seed=1).times_s
    assert len(times) == 40
    assert np.allclose(np.diff(times), 1 / 8)


def test_poisson_gaps_are_exponential():
    gaps = np.sort(np.diff(draw_schedule(flat(50, 400), dispersion=POISSON, seed=3).times_s))
    empirical = (np.arange(len(gaps)) + 0.5) / len(gaps)
    distance = np.abs(empirical - (1 - np.exp(-50 * gaps))).max()
    assert distance < 1.95 / math.sqrt(len(gaps))  # Kolmogorov-Smirnov, 0.1 %


@pytest.mark.parametrize("dispersion", [1.0, 4.0, 25.0])
def test_counts_have_the_mean_of_the_profile_and_the_dispersion_asked_for(dispersion):
    expected, num_seeds = 400.0, 600
    drawn = counts(flat(20, 20), dispersion, num_seeds)
    standard_error = math.sqrt(expected * dispersion / num_seeds)
    assert abs(drawn.mean() - expected) < 4 * standard_error
    # a finite window of a stationary Gamma renewal process: variance -> D t + (D^2 - 1) / 6 as t grows (Cox 1962, 4.5)
    variance = dispersion * expected + (dispersion**2 - 1) / 6
    assert drawn.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / num_seeds))


def test_bursty_arrivals_are_stationary_from_the_start():
    """An ordinary first gap would put too few or too many arrivals into the first seconds of a bursty schedule."""
    profile, num_seeds = flat(10, 10), 3000
    early = np.array([np.sum(draw_schedule(profile, dispersion=9.0, seed=s).times_s < 1) for s in range(num_seeds)])
    assert abs(early.mean() - 10) < 4 * early.std() / math.sqrt(num_seeds)


def test_a_ramp_puts_a_quarter_of_its_arrivals_into_its_first_half():
    times = draw_schedule(ramp(0, 200, 40), dispersion=POISSON, seed=5).times_s
    assert abs(len(times) - 4000) < 4 * math.sqrt(4000)
    first_half = np.sum(times < 20)
    assert abs(first_half - 1000) < 4 * math.sqrt(1000)


def test_steps_hold_each_rate_for_its_share_of_the_time():
    times = draw_schedule(steps((10, 0, 40), 30), dispersion=CONSTANT, seed=1).times_s
    held = [int(np.sum((times >= 10 * k) & (times < 10 * (k + 1)))) for k in range(3)]
    assert held == [100, 0, 400]


def test_a_gentle_warmup_climbs_to_the_first_rate():
    profile = with_warmup(flat(20, 60), 10, gently=True)
    times = draw_schedule(profile, dispersion=CONSTANT, seed=1, warmup_s=10).times_s
    assert np.sum(times < 10) == 100
    assert np.sum(times >= 10) == 1200
    assert np.sum(times < 5) == 25


@given(
    rates=st.lists(st.floats(0, 50), min_size=2, max_size=6).filter(lambda r: max(r) > 0.1),
    share=st.floats(0.001, 0.999),
)
def test_rescale_inverts_the_integral_of_the_rate(rates, share):
    """Against a brute-force integral on a fine grid."""
    times = np.arange(len(rates), dtype=float)
    profile = RateProfile(tuple(times), tuple(rates))
    unit = share * profile.expected_count
    moment = float(profile.rescale(np.array([unit]))[0])
    grid = np.linspace(0, moment, 20_001)
    integral = np.trapezoid(np.interp(grid, times, rates), grid)
    assert integral == pytest.approx(unit, rel=1e-3, abs=1e-3)


def test_a_trace_is_replayed_from_its_first_row(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp_s,model\n1700000000.0,a\n1700000001.5,b\n\n1700000001.5,c\n1700000004.0,d\n")
    schedule = replay_trace(trace, speed=2)
    assert schedule.times_s.tolist() == [0, 0.75, 0.75, 2.0]
    assert schedule.duration_s == pytest.approx(2.0 + 2.0 / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timestamp_s\n1\n3\n2\n", r"trace.csv:4: 2 comes before 3; sort the trace"),
        ("1\ntwo\n", r"trace.csv:2: 'two' is not a number of seconds"),
        ("1\nnan\n", r"trace.csv:2: 'nan' is not a finite number"),
        ("timestamp_s\n", "at least two rows"),
        ("5\n5\n5\n", "at least two rows with different times"),
    ],
)
def test_bad_traces_are_refused_with_the_line(tmp_path: Path, text: str, message: str):
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(LoadTestError, match=message):
        replay_trace(trace)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flat(0, 10), "some rate must be above 0"),
        (lambda: flat(-1, 10), "rates cannot be negative"),
        (lambda: flat(5, 0), "must be positive"),
        (lambda: flat(math.nan, 5), "not a finite number"),
        (lambda: steps((), 5), "at least one rate"),
        (lambda: draw_schedule(flat(5, 5), dispersion=-1, seed=1), "dispersion is -1"),
        (lambda: draw_schedule(flat(1e-6, 1), dispersion=CONSTANT, seed=1), "the schedule is empty"),
        (lambda: draw_schedule(flat(5, 5), dispersion=1, seed=1, warmup_s=5), "fills the whole schedule"),
        (lambda: replay_trace(Path("nowhere.csv")), "cannot read the trace nowhere.csv"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(LoadTestError, match=message):
        make()
