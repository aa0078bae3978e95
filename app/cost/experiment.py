"""One trace replayed end to end: tuned on its first days, judged on the rest, beside the clairvoyant and other policies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.cost.baselines import baselines as all_baselines
from app.cost.baselines import judge_baseline
from app.cost.forecast import ForecastOptions, horizon_for
from app.cost.hardware import Offer
from app.cost.judge import Clairvoyant, JudgeSpec, Queue, clairvoyant_levels, fluid_replica_seconds
from app.cost.policy import SizingOptions
from app.cost.replay import Outcome
from app.cost.traces import DAY_S, Floats, Ints, Trace, nyc_taxi, read_csv, servegen_m_large
from app.cost.tuning import Recording, TunedScale, replay_forecasts, tune_scales

_INTERVAL_S = 10
_SCALES = np.arange(0.8, 1.41, 0.02)
_MISS_SHARE = 0.5
_SEASON_DAYS = 14  # of past before the seasonal rule is tried, tuned on the second half: earlier it knows too few days


@dataclass(frozen=True, slots=True)
class Experiment:
    """What to replay; capacity_per_s None is a tenth of the mean rate. service_s: mean seconds in service, for
    those baselines that count ongoing requests.
    """

    trace: Trace
    startup_s: int
    capacity_per_s: float | None
    queue: Queue
    goal: float
    tune_days: int
    seed: int
    service_s: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.goal < 1:
            raise ValueError(f"goal is {self.goal}; it must lie between 0 and 1, such as 0.99")
        if not (math.isfinite(self.service_s) and self.service_s > 0):
            raise ValueError(f"service time is {self.service_s} s; it must be a positive number of seconds, such as 0.5")

    def spec(self) -> JudgeSpec:
        """The judge's rules."""
        capacity = self.trace.mean_rate_per_s / 10 if self.capacity_per_s is None else self.capacity_per_s
        return JudgeSpec(capacity, self.startup_s, _INTERVAL_S, 1, self.queue)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A forecast to try on the past, and how long after start-up an order must last, in seconds."""

    name: str
    options: ForecastOptions
    hold_s: int


_BURSTY = Candidate("growth forest and half-hour peak", ForecastOptions(), 600)
_SEASONAL = Candidate("season", ForecastOptions(forest_share=0.0, rule="season", step_headroom=1.0), 0)


@dataclass(frozen=True, slots=True)
class Report:
    """The judged part: text for a terminal, and what a plot needs."""

    text: str
    rate_per_s: Floats
    outcome: Outcome
    clairvoyant: Clairvoyant


def load_trace(name: str) -> Trace:
    """m-large, taxi or a CSV file."""
    shipped = {"m-large": servegen_m_large, "taxi": nyc_taxi}
    return shipped[name]() if name in shipped else read_csv(Path(name))


def run_experiment(experiment: Experiment, offer: Offer, baselines: bool = False) -> Report:
    """Tune on the first days, judge the rest, and compare. Raises ValueError when no scale reaches the goal on the past."""
    spec = experiment.spec()
    end = experiment.trace.duration_s // _INTERVAL_S * _INTERVAL_S
    arrivals = experiment.trace.arrivals(experiment.seed)[:end, None]
    cut_s = experiment.tune_days * DAY_S
    forecast, tuned, outcome = _tune_and_judge(experiment, spec, arrivals, cut_s)
    judged = arrivals[cut_s:, 0]
    best = clairvoyant_levels(judged, spec)
    days = len(judged) / DAY_S
    per_day = offer.usd_per_hour / 3600 / days
    cost = float(outcome.replica_seconds[0])
    lines = [
        f"{experiment.trace.name}: {experiment.tune_days} days tuned, {days:.1f} days judged, start-up {spec.startup_s} s,"
        f" {spec.queue} queue,"
        f" {spec.capacity_per_s:.2f} requests/s per replica, {offer.gpu} at {offer.usd_per_hour} USD/h",
        f"forecast: {forecast}; scale {tuned.scale:.2f}, chosen at {tuned.attainment:.3%} on the past",
        f"{'policy':<34} {'of clairvoyant':>14} {'in time':>9} {'USD/day':>9}",
        f"{'clairvoyant, no miss':<34} {1.0:>14.3f} {1.0:>9.3%} {best.replica_seconds * per_day:>9.2f}",
        f"{'this policy':<34} {cost / best.replica_seconds:>14.3f} {outcome.attainment:>9.3%} {cost * per_day:>9.2f}",
        f"{'fluid load (no limit of any kind)':<34} {fluid_replica_seconds(judged, spec) / best.replica_seconds:>14.3f}",
    ]
    if baselines:
        lines += _baseline_lines(experiment, spec, arrivals[:, 0], cut_s, best.replica_seconds, cost, per_day)
    rate = judged.reshape(-1, _INTERVAL_S).sum(1) / _INTERVAL_S
    return Report("\n".join(lines), rate, outcome, best)


def _tune_and_judge(experiment: Experiment, spec: JudgeSpec, arrivals: Ints, cut_s: int) -> tuple[str, TunedScale, Outcome]:
    """The forecast that would have been cheapest on the past, its scale, and the judged part replayed with both."""
    offered = arrivals.reshape(-1, _INTERVAL_S, 1).sum(1)
    cut, seasonal = cut_s // _INTERVAL_S, experiment.tune_days >= _SEASON_DAYS
    begin = cut // 2 if seasonal else 1
    sizing = SizingOptions(drain_s=60.0 if spec.queue == "fifo" else 0.0)
    tried, failed = [], []
    for candidate in (_BURSTY, _SEASONAL) if seasonal else (_BURSTY,):
        options = candidate.options
        recording = Recording.of(offered, horizon_for(spec.startup_s, _INTERVAL_S, candidate.hold_s), options.rule)
        past = recording.cross_validated(0, options, cut)[begin - 1 : -1, None]
        seconds = arrivals[begin * _INTERVAL_S : cut_s]
        try:
            tuned = tune_scales(seconds, past, spec, sizing, _SCALES, experiment.goal, _MISS_SHARE)[0]
        except ValueError as error:
            failed.append(error)  # raised below when no other forecast keeps the goal
            continue
        future = recording.walked(0, options, cut - 1, len(offered) - 1)[:, None]
        tried.append((tuned, candidate.name, future))
    if not tried:
        raise failed[0]
    tuned, name, future = min(tried, key=lambda one: one[0].replica_seconds)
    return name, tuned, replay_forecasts(arrivals[cut_s:], future, spec, sizing, np.array([tuned.scale]))


def _baseline_lines(
    experiment: Experiment, spec: JudgeSpec, arrivals: Ints, cut_s: int, clairvoyant: float, ours: float, usd: float
) -> list[str]:
    """A line for each. What this policy saves is counted against their best setting in hindsight that keeps the goal."""
    lines = [
        f"others, tuned on the past; {experiment.service_s:g} s in service; in brackets their best setting in hindsight"
    ]
    for baseline in all_baselines(experiment.service_s):
        result = judge_baseline(baseline, arrivals[:cut_s], arrivals[cut_s:], spec, experiment.goal, _MISS_SHARE)
        line = f"{baseline.name:<34}"
        if result.tuned_cost is None or result.tuned_attainment is None:
            line += f" {'no setting kept the goal on the past':>35}"
        else:
            line += (
                f" {result.tuned_cost / clairvoyant:>14.3f} {result.tuned_attainment:>9.3%} {result.tuned_cost * usd:>9.2f}"
            )
        if result.hindsight_cost is None:
            line += "   (none keeps the goal)"
        else:
            saved = 1 - ours / result.hindsight_cost
            cheaper = f"{saved:.1%} cheaper" if saved >= 0 else f"{-saved:.1%} dearer"
            line += f"   ({result.hindsight_cost / clairvoyant:.3f}: this policy is {cheaper})"
        lines.append(line)
    return lines


def plot(report: Report, path: Path) -> None:
    """Load in replicas, replicas on, and the clairvoyant's, over the judged days, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    spec = report.outcome.spec
    days = np.arange(len(report.rate_per_s)) * spec.interval_s / DAY_S
    figure, axes = plt.subplots(figsize=(12, 4))
    axes.plot(days, report.outcome.total[:, 0], lw=0.8, label="this policy")
    axes.plot(days, report.clairvoyant.levels, lw=0.8, label="clairvoyant")
    axes.plot(days, report.rate_per_s / spec.capacity_per_s, lw=0.4, alpha=0.7, label="load")
    axes.set(xlabel="days judged", ylabel="replicas")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
