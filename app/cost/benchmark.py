"""`python -m app.cost.benchmark` (`make replay-benchmark`): the policy against the clairvoyant plan; one JSON line last.

Each scenario is tuned on the first part of its trace and judged on the rest, for several seeds (each shifts the trace's
window edges and draws the arrivals anew). cost_ratio is the worst seed's replica-seconds over the clairvoyant's that
misses nothing; attainment the worst seed's. What is tuned is one scale per seed, on the past only. How much of the
allowed misses the past may use (`miss_share`), the horizons and the sizing were settled with judged parts in view; so was
the taxi's seasonal rule, whose kind was ranked by cost on the past (weeks 3 and 4).

Within a seed the edges of the taxi's windows come back at the same minute of every day, and the seasonal rule meets them
again. Its ratio is that of demand that repeats in this way, not of steps at minutes that no earlier day has shown.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from app.cost.baselines import baselines, best_in_hindsight
from app.cost.forecast import DemandForecaster, ForecastOptions, horizon_for
from app.cost.judge import (
    Clairvoyant,
    JudgeSpec,
    Queue,
    clairvoyant_levels,
    clairvoyant_with_misses,
    fluid_replica_seconds,
)
from app.cost.policy import QuantilePolicy, Sizing, SizingOptions
from app.cost.replay import Outcome, replay
from app.cost.traces import DAY_S, WEEK_S, Floats, Ints, Trace, nyc_taxi, servegen_m_large, servegen_m_large_clients
from app.cost.tuning import Recording, TunedScale, replay_forecasts, tune_scales

_INTERVAL_S = 10


@dataclass(frozen=True, slots=True)
class Scenario:
    """One judged setting; scales are (first, last, step)."""

    name: str
    queue: Queue
    goal: float
    miss_share: float
    sizing: SizingOptions
    scales: tuple[float, float, float]

    def grid(self) -> Floats:
        """All scales to try."""
        first, last, step = self.scales
        return np.arange(first, last + step / 2, step)


@dataclass(frozen=True, slots=True)
class Group:
    """Scenarios over one trace, one start-up time and one forecast.

    tuned_s seconds are the past; its first warm_s are not tuned on. hold_s: how long a decision must last.
    """

    trace: str
    startup_s: int
    hold_s: int
    tuned_s: int
    forecast: ForecastOptions
    scenarios: Sequence[Scenario]
    warm_s: int = _INTERVAL_S


GROUPS = (
    Group(
        "m_large",
        300,
        600,
        WEEK_S,
        ForecastOptions(),
        (
            Scenario("m_large_300s_fifo", "fifo", 0.99, 0.7, SizingOptions(drain_s=60), (1.04, 1.16, 0.01)),
            Scenario("m_large_300s_bounded", "bounded", 0.99, 0.7, SizingOptions(drain_s=0), (0.84, 0.93, 0.01)),
            Scenario("m_large_300s_bounded_999", "bounded", 0.999, 0.25, SizingOptions(drain_s=0), (1.06, 1.2, 0.01)),
        ),
    ),
    Group(
        "m_large",
        30,
        60,
        WEEK_S,
        ForecastOptions(),
        (Scenario("m_large_30s_fifo", "fifo", 0.99, 0.5, SizingOptions(drain_s=10, patience=2), (0.92, 1.04, 0.01)),),
    ),
    Group(
        "taxi",
        300,
        0,
        4 * WEEK_S,
        ForecastOptions(forest_share=0.0, rule="season", step_headroom=1.0),
        (Scenario("taxi_300s_fifo", "fifo", 0.999, 1.0, SizingOptions(drain_s=10, patience=2), (0.96, 1.12, 0.005)),),
        warm_s=2 * WEEK_S,  # a week's profile has been seen twice by then
    ),
)
_TRACES = {"m_large": servegen_m_large, "taxi": nyc_taxi}


@dataclass(frozen=True, slots=True)
class Judged:
    """Results of one scenario, one entry per seed."""

    cost_ratio: list[float] = field(default_factory=list)
    attainment: list[float] = field(default_factory=list)
    over_fluid: list[float] = field(default_factory=list)
    interval: list[tuple[float, float] | None] = field(default_factory=list)

    def add(self, outcome: Outcome, pool: int, best: Clairvoyant, fluid: float) -> None:
        """One seed's run against its clairvoyant."""
        self.cost_ratio.append(float(outcome.replica_seconds[pool]) / best.replica_seconds)
        self.attainment.append(float(outcome.pool_attainment[pool]))
        self.over_fluid.append(best.replica_seconds / fluid)
        self.interval.append(day_block_interval(outcome.total[:, pool], best, outcome.spec))

    def summary(self) -> dict[str, float | list[float] | None]:
        """The worst seed, as the JSON line says it."""
        worst = int(np.argmax(self.cost_ratio))
        interval = self.interval[worst]
        return {
            "cost_ratio": round(self.cost_ratio[worst], 4),
            "attainment": round(min(self.attainment), 5),
            "clairvoyant_over_fluid": round(self.over_fluid[worst], 4),
            "cost_ratio_day_block_95": interval and [round(edge, 3) for edge in interval],
        }


def day_block_interval(total: Ints, best: Clairvoyant, spec: JudgeSpec, num_draws: int = 2000) -> tuple[float, float] | None:
    """95 % interval of the cost ratio when the judged days are drawn anew with replacement; None for less than two days."""
    day = DAY_S // spec.interval_s
    days = len(total) // day
    if days < 2:
        return None
    starts = np.maximum(np.diff(best.levels, prepend=best.levels[0]), 0)
    ours = total[: days * day].reshape(days, day).sum(1) * spec.interval_s
    theirs = (best.levels * spec.interval_s + starts * spec.startup_s)[: days * day].reshape(days, day).sum(1)
    drawn = np.random.default_rng(0).integers(0, days, (num_draws, days))
    low, high = np.quantile(ours[drawn].sum(1) / theirs[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def judge_group(
    group: Group, seeds: Sequence[int], note: bool = True, service_times: Sequence[float] = ()
) -> dict[str, Judged]:
    """Tune and judge all scenarios of a group; prints one line per seed and scenario when `note`. service_times: also print
    what other policies cost, for each mean time in service, in seconds.
    """
    trace: Trace = _TRACES[group.trace]()
    arrivals = np.stack([trace.arrivals(seed) for seed in seeds], axis=1)
    cut = group.tuned_s // _INTERVAL_S
    offered = arrivals.reshape(-1, _INTERVAL_S, len(seeds)).sum(1)
    recording = Recording.of(offered, horizon_for(group.startup_s, _INTERVAL_S, group.hold_s), group.forecast.rule)
    past = np.stack([recording.cross_validated(pool, group.forecast, cut) for pool in range(len(seeds))], axis=1)[:-1]
    future = np.stack(
        [recording.walked(pool, group.forecast, cut - 1, len(offered) - 1) for pool in range(len(seeds))], axis=1
    )
    del recording
    judged = {}
    for scenario in group.scenarios:
        spec = JudgeSpec(trace.mean_rate_per_s / 10, group.startup_s, _INTERVAL_S, 1, scenario.queue)
        tuned = tune_scales(
            arrivals[group.warm_s : group.tuned_s],
            past[group.warm_s // _INTERVAL_S - 1 :],
            spec,
            scenario.sizing,
            scenario.grid(),
            scenario.goal,
            scenario.miss_share,
        )
        judged[scenario.name] = _judge(scenario, spec, arrivals[group.tuned_s :], future, tuned, note)
        for service_s in service_times:
            _print_others(scenario, spec, arrivals[group.tuned_s :], judged[scenario.name], service_s)
    return judged


def _judge(
    scenario: Scenario, spec: JudgeSpec, arrivals: Ints, forecasts: Floats, tuned: Sequence[TunedScale], note: bool
) -> Judged:
    scale = np.array([choice.scale for choice in tuned])
    outcome = replay_forecasts(arrivals, forecasts, spec, scenario.sizing, scale)
    result = Judged()
    best = [clairvoyant_levels(arrivals[:, pool], spec) for pool in range(arrivals.shape[1])]
    for pool, plan in enumerate(best):
        result.add(outcome, pool, plan, fluid_replica_seconds(arrivals[:, pool], spec))
        if note:
            _print_seed(scenario, pool, tuned[pool], result)
    if note:
        may_miss = clairvoyant_with_misses(arrivals[:, 0], spec, 1.0 - result.attainment[0])
        ratio = may_miss.replica_seconds / best[0].replica_seconds
        print(f"{scenario.name}: first seed's plan allowed the same misses (refused) costs {ratio:.3f} of the clairvoyant")
    return result


def _print_others(scenario: Scenario, spec: JudgeSpec, arrivals: Ints, ours: Judged, service_s: float) -> None:
    """One line per policy: its cheapest setting in hindsight that keeps the goal, so at an attainment no better than asked
    for, and how much cheaper ours is, over the seeds.
    """
    best = [clairvoyant_levels(arrivals[:, pool], spec).replica_seconds for pool in range(arrivals.shape[1])]
    for baseline in baselines(service_s):
        ratios = [best_in_hindsight(baseline, arrivals[:, pool], spec, scenario.goal) for pool in range(len(best))]
        line = f"{scenario.name}, {service_s:g} s in service: {baseline.name}"
        if any(ratio is None for ratio in ratios):
            print(f"{line} never keeps {scenario.goal:.1%} in some seed", flush=True)
            continue
        theirs = np.array(ratios, np.float64) / np.array(best)
        saved = 1.0 - np.array(ours.cost_ratio) / theirs
        print(
            f"{line} {theirs.min():.3f} to {theirs.max():.3f} of the clairvoyant; ours is {saved.min():.1%} to"
            f" {saved.max():.1%} cheaper",
            flush=True,
        )


def _print_seed(scenario: Scenario, pool: int, tuned: TunedScale, result: Judged) -> None:
    interval = result.interval[-1]
    days = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    print(
        f"{scenario.name} seed {pool}: scale {tuned.scale:.3f} (past {tuned.attainment:.4%}) ->"
        f" cost {result.cost_ratio[-1]:.4f}{days} at {result.attainment[-1]:.4%},"
        f" clairvoyant {result.over_fluid[-1]:.4f} of fluid",
        flush=True,
    )


def replay_pairs(num_pairs: int = 200, interval_s: int = 180) -> str:
    """Time the live policy over 14 days of many pools, each decided every `interval_s`; one line of text.

    ServeGen's clients stand in for pairs, repeated with other seeds beyond 162; a replica serves a tenth of the mean
    pool's rate.
    """
    clients = servegen_m_large_clients()
    pairs = [(clients[index % len(clients)], index) for index in range(num_pairs)]
    arrivals = np.stack([trace.arrivals(seed).astype(np.int32) for trace, seed in pairs], axis=1)
    arrivals = arrivals[: len(arrivals) // interval_s * interval_s]
    capacity = float(arrivals.mean()) * 2
    policy = QuantilePolicy(
        DemandForecaster(num_pairs, horizon_for(300, interval_s), ForecastOptions()), Sizing(capacity, SizingOptions())
    )
    started = time.monotonic()
    outcome = replay(arrivals, policy, JudgeSpec(capacity, 300, interval_s), arrivals[:interval_s].sum(0))
    took = time.monotonic() - started
    return (
        f"{num_pairs} pools x {len(arrivals) / DAY_S:.1f} days, a decision every {interval_s} s: replayed in {took:.1f} s"
        f" ({outcome.attainment:.3%} in time, {outcome.total.sum(1).mean():.1f} replicas)"
    )


def _seconds(text: str) -> tuple[float, ...]:
    times = tuple(float(part) for part in text.split(","))
    if not all(np.isfinite(one) and one > 0 for one in times):
        raise argparse.ArgumentTypeError(f"{text!r}: give positive numbers of seconds, such as 0.5,2,5")
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0; default 5")
    parser.add_argument("--only", metavar="TEXT", default="", help="only groups with a scenario whose name contains TEXT")
    parser.add_argument(
        "--others",
        metavar="SECONDS",
        type=_seconds,
        default=(),
        help="also judge other policies, each at its best setting in hindsight, for these times in service, such as 0.5,2,5",
    )
    parser.add_argument("--pairs", action="store_true", help="only time 14 days of 200 pools")
    args = parser.parse_args(argv)
    if args.pairs:
        print(replay_pairs())
        return 0
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    started, results = time.monotonic(), {}
    for group in GROUPS:
        if any(args.only in scenario.name for scenario in group.scenarios):
            results.update(judge_group(group, range(args.seeds), service_times=args.others))
    print(f"{args.seeds} seeds in {time.monotonic() - started:.0f} s")
    print(json.dumps({name: judged.summary() for name, judged in results.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
