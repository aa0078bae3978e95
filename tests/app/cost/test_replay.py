"""Replay against a slow twin that follows replicas and requests one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

from app.cost.judge import JudgeSpec, clairvoyant_levels
from app.cost.replay import Observation, Outcome, replay
from app.cost.traces import Ints
from tests.app.cost.slow_queue import late_requests


@dataclass
class Script:
    """A policy that reads its targets from a list and keeps what it saw."""

    targets: Ints  # [K, P]

    def __post_init__(self) -> None:
        self.seen: list[Observation] = []

    def decide(self, seen: Observation) -> Ints:
        self.seen.append(seen)
        return np.asarray(self.targets[len(self.seen) - 1])


def slow_fleet(targets: list[int], spec: JudgeSpec) -> tuple[list[int], list[int]]:
    """(billed replicas per interval, serving replicas per second), each replica a record of its own."""
    replicas: list[int] = []  # the second each becomes ready
    billed, serving = [], []
    for index, wanted in enumerate(targets):
        now = index * spec.interval_s
        while len(replicas) < max(wanted, spec.minimum):
            replicas.append(now if index == 0 else now + spec.startup_s)
        replicas.sort()
        del replicas[max(wanted, spec.minimum) :]  # the one furthest from ready goes first
        billed.append(len(replicas))
        serving += [sum(ready <= now + second for ready in replicas) for second in range(spec.interval_s)]
    return billed, serving


def run(arrivals: Ints, targets: Ints, spec: JudgeSpec) -> tuple[Outcome, Script]:
    policy = Script(targets)
    return replay(arrivals, policy, spec, np.zeros(arrivals.shape[1], np.int64)), policy


@pytest.mark.parametrize("queue", ["fifo", "bounded"])
@pytest.mark.parametrize(("interval_s", "startup_s"), [(10, 30), (10, 0), (7, 10), (3, 300)])
@pytest.mark.parametrize("seed", range(4))
def test_same_as_following_each_replica_and_request(queue: str, interval_s: int, startup_s: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = JudgeSpec(0.75, startup_s, interval_s, 1, queue)  # type: ignore[arg-type]
    num_slots, num_pools = 37, 3
    targets = np.maximum(0, 4 + np.cumsum(rng.integers(-3, 4, (num_slots, num_pools)), 0))
    arrivals = rng.poisson(rng.gamma(1.0, 3.0, (num_slots * interval_s, num_pools)))
    outcome, _ = run(arrivals, targets, spec)
    for pool in range(num_pools):
        billed, serving = slow_fleet(targets[:, pool].tolist(), spec)
        capacity = [Fraction("0.75") * count for count in serving]
        capacity.append(capacity[-1])
        late, by_slot = late_requests(arrivals[:, pool].tolist(), capacity, interval_s, refuse=queue == "bounded")
        assert outcome.total[:, pool].tolist() == billed
        assert outcome.slot_late[:, pool].sum() == pytest.approx(float(late))
        np.testing.assert_allclose(outcome.slot_late[:-1, pool], [float(part) for part in by_slot[: num_slots - 1]])


def test_a_policy_sees_only_what_is_over() -> None:
    arrivals = np.arange(60).reshape(60, 1)
    _, policy = run(arrivals, np.full((6, 1), 3), JudgeSpec(1.0, 20))
    assert [int(seen.offered[0]) for seen in policy.seen] == [0, *arrivals[:50, 0].reshape(5, 10).sum(1).tolist()]
    assert [seen.time_s for seen in policy.seen] == [0, 10, 20, 30, 40, 50]


def test_billed_from_order_to_removal_or_cancel() -> None:
    targets = np.array([[1], [5], [5], [2], [2], [1], [1]])
    outcome, policy = run(np.zeros((70, 1), np.int64), targets, JudgeSpec(1.0, startup_s=30))
    assert outcome.replica_seconds.tolist() == [170.0]
    assert [int(seen.pending[0]) for seen in policy.seen] == [0, 0, 4, 4, 0, 0, 0]  # three cancelled, one became ready
    assert [int(seen.ready[0]) for seen in policy.seen] == [0, 1, 1, 1, 2, 2, 1]


def test_never_below_the_minimum() -> None:
    outcome, _ = run(np.zeros((50, 2), np.int64), np.zeros((5, 2), np.int64), JudgeSpec(1.0, minimum=2))
    assert outcome.total.tolist() == [[2, 2]] * 5
    assert outcome.attainment == 1.0
    assert outcome.pool_attainment.tolist() == [1.0, 1.0]


def test_no_plan_without_a_miss_is_cheaper_than_the_needed_counts_allow() -> None:
    rng = np.random.default_rng(5)
    spec = JudgeSpec(3.0, startup_s=40)
    arrivals = rng.poisson(np.exp(rng.normal(3, 0.5, 120)).repeat(10))[:, None]
    plan = clairvoyant_levels(arrivals[:, 0], spec)
    outcome, _ = run(arrivals, plan.levels[:, None], replace(spec, startup_s=0))
    assert outcome.slot_late[:-1].sum() == pytest.approx(0.0, abs=1e-3)
    assert plan.replica_seconds == outcome.replica_seconds[0] + plan.num_starts * spec.startup_s
    for extra in (0, 1, 2):  # any feasible plan of real orders costs at least as much
        static, _ = run(arrivals, np.full((120, 1), plan.levels.max() + extra), spec)
        assert static.attainment == pytest.approx(1.0)
        assert static.replica_seconds[0] >= plan.replica_seconds


def test_part_of_an_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number of 10 s"):
        run(np.zeros((15, 1), np.int64), np.ones((2, 1), np.int64), JudgeSpec(1.0))
