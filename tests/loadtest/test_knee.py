"""The knee search: against an oracle that knows the answer, and against a queue simulated independently."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest

from loadtest.cli import build_parser
from loadtest.commands.knee import TrialRunner
from loadtest.errors import LoadTestError
from loadtest.knee import KneeOptions, KneeSearch
from loadtest.results import RunResult, Trial
from tests.loadtest.runs import at_times, measure
from tests.loadtest.stub import StubService
from tests.loadtest.virtual_time import run_virtually


@pytest.fixture(scope="module")
def any_run() -> RunResult:
    return measure(StubService(), at_times([0.0, 0.1]))


@dataclass
class Oracle:
    """A service whose SLO holds up to capacity_per_s."""

    capacity_per_s: float
    run: RunResult
    broken: tuple[int, ...] = ()

    async def __call__(self, rate, number, purpose) -> Trial:
        run = self.run
        if number in self.broken:
            run = run.model_copy(update={"valid": False, "invalid_because": ["send lag"]})
        verdict = "met" if rate <= self.capacity_per_s else "missed"
        return Trial(rate_per_s=rate, purpose=purpose, verdict=verdict, stopped_early=False, run=run)


def search(oracle: Oracle, **options) -> KneeSearch:
    found = KneeSearch(KneeOptions(**options), oracle)
    asyncio.run(found.run())
    return found


@pytest.mark.parametrize("capacity", [1.0, 3.7, 50.0, 199.0])
def test_the_bracket_holds_the_capacity_and_is_as_narrow_as_asked(any_run, capacity):
    found = search(Oracle(capacity, any_run), low_per_s=1, high_per_s=200, precision=0.03, max_trials=30)
    assert found.completed
    assert found.passes_per_s <= capacity < found.fails_per_s <= found.passes_per_s * 1.03
    assert len(found.trials) <= 16


def test_ends_of_the_range(any_run):
    found = search(Oracle(0.5, any_run), low_per_s=1, high_per_s=200)
    assert found.passes_per_s is None
    assert "try a lower --low" in found.finished
    found = search(Oracle(1e9, any_run), low_per_s=1, high_per_s=50)
    assert (found.passes_per_s, found.fails_per_s) == (50, None)
    assert "raise --high" in found.finished
    found = search(Oracle(77, any_run), low_per_s=1, high_per_s=200, max_trials=4)
    assert (found.passes_per_s, found.fails_per_s) == (8, None)
    assert "stopped after 4 trials" in found.finished


def test_a_sweep_puts_points_on_both_sides_without_moving_the_knee(any_run):
    found = search(Oracle(50, any_run), low_per_s=1, high_per_s=200, sweep_points=5, max_trials=30)
    swept = [trial.rate_per_s for trial in found.trials if trial.purpose == "sweep"]
    assert len(swept) == 10
    assert sum(rate < found.passes_per_s for rate in swept) == 5
    assert found.passes_per_s <= 50 < found.fails_per_s


def test_an_invalid_trial_is_repeated_once(any_run):
    found = search(Oracle(50, any_run, broken=(2,)), low_per_s=1, high_per_s=200, max_trials=30)
    assert found.passes_per_s <= 50 < found.fails_per_s
    assert found.trials[2].rate_per_s == found.trials[3].rate_per_s
    with pytest.raises(LoadTestError, match="two trials at 4 requests/s are not valid: send lag"):
        search(Oracle(50, any_run, broken=(2, 3)), low_per_s=1, high_per_s=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_per_s": 5, "high_per_s": 5}, "0 < low < high"),
        ({"precision": 0}, "precision is 0"),
        ({"max_trials": 0}, "max-trials"),
        ({"sweep_points": 99}, "sweep"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(LoadTestError, match=message):
        KneeOptions(**options)


def true_knee(service_s: float, limit_s: float, share: float) -> float:
    """Rate at which `share` of an M/D/1 queue's requests end within the limit: Lindley's recursion over 300,000 arrivals."""
    gaps = np.random.default_rng(1).exponential(size=300_000)

    def good_share(rate_per_s: float) -> float:
        walk = np.concatenate([[0.0], np.cumsum(service_s - gaps / rate_per_s)])
        waits = walk - np.minimum.accumulate(walk)
        return float(np.mean(waits + service_s <= limit_s))

    low, high = 1.0, 1 / service_s
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if good_share(middle) >= share else (low, middle)
    return low


def knee_arguments(url: str, *more: str):
    argv = ["knee", "--url", url, "--workload", "single", "--no-progress", "--trial-warmup", "0", *more]
    return build_parser().parse_args(argv)


def test_the_knee_of_a_single_server_queue():
    """20 ms a request, 80 ms allowed for 90 %: one finite trial of a queue strays, so the bracket may lie 15 % off."""

    async def find() -> KneeSearch:
        async with StubService(lambda _: 0.0195, one_by_one=True).serving() as url:  # and 0.5 ms of the stub's own turns
            slo = ("--slo-ms", "80", "--percentile", "90", "--confidence", "0.9")
            args = knee_arguments(url, *slo, "--low", "20", "--trial-duration", "10", "--max-trial-duration", "20")
            found = KneeSearch(KneeOptions(20, 60, precision=0.15, max_trials=8), TrialRunner(args).run_trial)
            await found.run()
            return found

    found = run_virtually(find())
    assert found.completed, found.finished
    truth = true_knee(0.02, 0.08, 0.9)
    assert 30 < truth < 40
    assert found.passes_per_s < truth * 1.15
    assert found.fails_per_s > truth / 1.15
    assert found.fails_per_s <= found.passes_per_s * 1.15
    assert all(trial.run.valid for trial in found.trials)
    assert any(trial.stopped_early for trial in found.trials)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--low", "0.1"), "raise --low or --max-trial-duration"),
        (("--trial-duration", "0"), "--trial-duration must be above 0"),
        (("--slo-ms", "0"), "--slo-ms must be above 0"),
        (("--confidence", "1"), "--confidence is 1"),
        (("--timeout", "0"), "timeout must be above 0"),
        (("--seed", "-1"), "--seed cannot be negative"),
        (("--price-per-replica-hour", "-1"), "cannot be negative"),
    ],
)
def test_a_search_that_cannot_succeed_is_refused_before_it_starts(more, message):
    with pytest.raises(LoadTestError, match=message):
        TrialRunner(knee_arguments("http://127.0.0.1:1", *more))
