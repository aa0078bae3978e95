"""The forecast is chosen by what it would have cost on the past: the season where days repeat, the forest where not."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from app.cost import experiment
from app.cost.baselines import Baseline, baselines
from app.cost.experiment import Experiment, run_experiment
from app.cost.forecast import ForecastOptions
from app.cost.hardware import Offer
from app.cost.traces import Floats, Trace

OFFER = Offer("H100", "on_demand", 3.0, "somewhere", "one", "made up")
DAYS, WINDOWS = 15, 48  # half hours a day


def daily(noise: float) -> Floats:
    """float64[days * windows]: a daily shape of steps, each day's windows off by lognormal `noise`."""
    rng = np.random.default_rng(5)
    shape = 30 * np.exp(rng.normal(0, 0.5, WINDOWS))
    return np.tile(shape, DAYS) * np.exp(rng.normal(0, noise, DAYS * WINDOWS))


def bursty() -> Floats:
    """float64[days * windows]: the same spread, and no day like another."""
    return 30 * np.exp(np.random.default_rng(5).normal(0, 0.5, DAYS * WINDOWS))


@pytest.mark.parametrize(
    ("rate", "days", "chosen"), [(daily(0.02), 14, "season"), (bursty(), 14, "growth"), (daily(0.02), 13, "growth")]
)
def test_the_cheaper_on_the_past_is_judged(rate: Floats, days: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_INTERVAL_S", 300)
    monkeypatch.setattr(experiment, "_SCALES", np.arange(1.0, 3.0, 0.2))
    few_trees = replace(experiment._BURSTY, options=ForecastOptions(num_trees=8, min_leaf=50))
    monkeypatch.setattr(experiment, "_BURSTY", few_trees)
    trace = Trace("made", 1800, rate, np.ones(len(rate)))
    report = run_experiment(Experiment(trace, 300, None, "fifo", 0.95, days, 1), OFFER)
    assert f"forecast: {chosen}" in report.text
    assert report.outcome.attainment > 0.9
    ratio = float(report.outcome.replica_seconds[0]) / report.clairvoyant.replica_seconds
    assert f"{ratio:.3f}" in report.text
    if chosen == "season":
        assert ratio < 1.15


def test_a_goal_that_no_forecast_keeps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_INTERVAL_S", 300)
    monkeypatch.setattr(experiment, "_SCALES", np.array([0.3]))
    trace = Trace("made", 1800, daily(0.02), np.ones(DAYS * WINDOWS))
    with pytest.raises(ValueError, match="try larger"):
        run_experiment(Experiment(trace, 300, None, "fifo", 0.95, 2, 1), OFFER)


def test_others_are_judged_at_the_stated_service_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve's rule counts ongoing requests: the same backlog is more replicas' worth when each holds few at a time."""
    monkeypatch.setattr(experiment, "_INTERVAL_S", 300)
    monkeypatch.setattr(experiment, "_SCALES", np.arange(1.0, 3.0, 0.2))
    few_trees = replace(experiment._BURSTY, options=ForecastOptions(num_trees=8, min_leaf=50))
    monkeypatch.setattr(experiment, "_BURSTY", few_trees)
    wanted = {"static peak": "replicas", "Ray Serve, tuned, no cap": "target", "last value, 180 s": "scale"}

    def few_settings(service_s: float) -> list[Baseline]:
        chosen = [baseline for baseline in baselines(service_s) if baseline.name in wanted]
        return [replace(b, grid=b.grid | {wanted[b.name]: list(b.grid[wanted[b.name]])[::6]}) for b in chosen]

    monkeypatch.setattr(experiment, "all_baselines", few_settings)
    trace = Trace("made", 1800, bursty()[: 4 * WINDOWS], np.ones(4 * WINDOWS))

    def lines(service_s: float) -> dict[str, str]:
        report = run_experiment(Experiment(trace, 300, None, "fifo", 0.9, 2, 1, service_s), OFFER, baselines=True)
        assert f"{service_s:g} s in service" in report.text
        ours = float(report.outcome.replica_seconds[0]) / report.clairvoyant.replica_seconds
        found = {line[:34].strip(): line for line in report.text.splitlines()}
        told = re.search(r"\(([\d.]+): this policy is ([\d.]+)% (\w+)\)", found["static peak"])
        assert told is not None
        ratio, said, word = told.groups()
        saved = 1 - ours / float(ratio)
        assert float(said) == pytest.approx(abs(saved) * 100, abs=0.1)
        assert word == ("cheaper" if saved >= 0 else "dearer")
        return found

    short, long = lines(0.5), lines(20.0)
    uncapped = "Ray Serve, tuned, no cap"
    assert short[uncapped] != long[uncapped]
    assert short["last value, 180 s"] == long["last value, 180 s"]


def test_a_service_time_that_is_none_is_refused() -> None:
    trace = Trace("made", 1800, daily(0.02), np.ones(DAYS * WINDOWS))
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="service time"):
            Experiment(trace, 300, None, "fifo", 0.95, 2, 1, wrong)
