"""The judge against slow twins: plans tried one by one, requests followed one by one."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from app.cost.judge import (
    JudgeSpec,
    clairvoyant_levels,
    clairvoyant_with_misses,
    fluid_replica_seconds,
    keep_through_gaps,
    needed_replicas,
)
from app.cost.traces import Ints
from tests.app.cost.slow_queue import late_requests


def random_arrivals(seed: int, num_intervals: int, width: int, mean: float) -> Ints:
    rng = np.random.default_rng(seed)
    rate = mean * np.exp(rng.normal(0, 0.6, num_intervals)).repeat(width)
    return rng.poisson(rate * rng.gamma(0.7, 1 / 0.7, len(rate)))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("width", "minimum"), [(1, 0), (2, 1), (10, 1)])
def test_needed_replicas_are_the_fewest_that_let_nothing_wait(seed: int, width: int, minimum: int) -> None:
    spec = JudgeSpec(capacity_per_s=1.7, startup_s=4, interval_s=width, minimum=minimum)
    arrivals = random_arrivals(seed, 9, width, 5.0)
    needed = needed_replicas(arrivals, spec)
    capacity = [Fraction("1.7") * int(count) for count in needed.repeat(width)]
    rest = [Fraction(10**9)] * width  # what is due after the last interval is not the last interval's duty
    assert late_requests(arrivals.tolist(), capacity + rest, width)[0] == 0
    for index, count in enumerate(needed.tolist()):
        if count > minimum:
            fewer = list(capacity)
            fewer[index * width : (index + 1) * width] = [Fraction("1.7") * (count - 1)] * width
            until = (index + 1) * width
            assert late_requests(arrivals[:until].tolist(), fewer[:until] + rest, width)[0] > 0


def cheapest_by_trying(needed: list[int], spec: JudgeSpec) -> int:
    """Every integer plan over the needed counts: billed seconds and start-ups of its cheapest."""
    top = max(needed)
    costs = []
    for plan in itertools.product(*(range(least, top + 1) for least in needed)):
        starts = sum(max(0, after - before) for before, after in itertools.pairwise(plan))
        costs.append(sum(plan) * spec.interval_s + starts * spec.startup_s)
    return min(costs)


@pytest.mark.parametrize("startup_s", [0, 9, 10, 20, 25, 60])
def test_levels_kept_through_gaps_cost_the_least_of_all_plans(startup_s: int) -> None:
    rng = np.random.default_rng(startup_s)
    spec = JudgeSpec(capacity_per_s=1.0, startup_s=startup_s, minimum=0)
    for _ in range(25):
        needed = rng.integers(0, 4, 7)
        levels, num_starts = keep_through_gaps(needed, spec)
        assert np.all(levels >= needed)
        assert num_starts == np.maximum(np.diff(levels), 0).sum()
        assert levels.sum() * 10 + num_starts * startup_s == cheapest_by_trying(needed.tolist(), spec)


def test_a_plan_that_may_miss_keeps_its_share_and_costs_no_more() -> None:
    spec = JudgeSpec(capacity_per_s=2.0, startup_s=60)
    arrivals = random_arrivals(3, 400, 10, 20.0)
    without = clairvoyant_levels(arrivals, spec)
    before = without.replica_seconds
    assert before >= fluid_replica_seconds(arrivals, spec)
    for share in (0.001, 0.01, 0.1):
        plan = clairvoyant_with_misses(arrivals, spec, share)
        assert plan.num_missed <= share * arrivals.sum()
        assert plan.replica_seconds <= before
        before = plan.replica_seconds
        capacity = [2 * int(count) for count in plan.levels.repeat(10)]
        refused, _ = late_requests(arrivals.tolist(), [*capacity, capacity[-1]], 10, refuse=True)
        assert float(refused) == pytest.approx(plan.num_missed)


def test_a_steady_load_needs_no_start() -> None:
    spec = JudgeSpec(capacity_per_s=10.0)
    plan = clairvoyant_levels(np.full(600, 95), spec)
    assert plan.num_starts == 0
    assert plan.replica_seconds == 10 * 600
    assert fluid_replica_seconds(np.full(600, 95), spec) == 9.5 * 600


@pytest.mark.parametrize(
    "wrong", [{"capacity_per_s": 0}, {"interval_s": 0}, {"startup_s": -1}, {"minimum": -1}, {"queue": "lifo"}]
)
def test_bad_rules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        JudgeSpec(**{"capacity_per_s": 1.0, **wrong})  # type: ignore[arg-type]
