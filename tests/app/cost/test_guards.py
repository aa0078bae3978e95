"""The fleet's policy: what its guards promise holds in any history, and it is the plain policy where no guard is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cost.forecast import DemandForecaster, ForecastOptions, horizon_for
from app.cost.guards import REASONS, FleetDecision, GuardedPolicy, GuardOptions, Limits, PoolSpec
from app.cost.judge import JudgeSpec
from app.cost.policy import QuantilePolicy, Sizing, SizingOptions
from app.cost.replay import Observation, replay

INTERVAL_S = 30
LOOSE = GuardOptions(interval_s=INTERVAL_S, hold_s=120, idle_s=300, warm_up_s=0)


def pool(name: str = "a", **changes: Any) -> PoolSpec:
    return PoolSpec(**{"name": name, "capacity_per_s": 10.0, "startup_s": 60, **changes})


class Run:
    """Drives a policy by hand: targets are carried out at once."""

    def __init__(self, policy: GuardedPolicy, minimum: int = 1, maximum: int = 100) -> None:
        self.policy = policy
        self.num = len(policy.pools)
        self.minimum = np.full(self.num, minimum)
        self.maximum = np.full(self.num, maximum)
        self.total = np.full(self.num, minimum)
        self.time_s = 0.0

    def step(self, *rate: float, known: Any = True, backlog: float = 0.0, ready: Any = None) -> FleetDecision:
        """One slot at `rate` requests per second for each pool."""
        self.time_s += INTERVAL_S
        ready = self.total if ready is None else np.minimum(np.array(ready), self.total)
        offered = np.round(np.array(rate) * INTERVAL_S).astype(np.int64)
        seen = Observation(self.time_s, offered, np.zeros(self.num), np.full(self.num, backlog), ready, self.total - ready)
        known = np.broadcast_to(np.array(known), self.num)
        decision = self.policy.plan(seen, Limits(self.minimum, self.maximum, known))
        self.total = decision.target
        return decision


def test_without_a_need_for_guards_it_is_the_plain_policy() -> None:
    """Two pools with different start-ups against two one-pool policies, replayed over the same arrivals."""
    rng = np.random.default_rng(3)
    arrivals = rng.poisson(np.repeat(40 * np.exp(rng.normal(0, 0.3, (36, 2))), 300, 0))
    spec = JudgeSpec(10.0, 60, INTERVAL_S)
    options = ForecastOptions(num_trees=8, min_leaf=20, refit_s=3600)
    guards = GuardOptions(INTERVAL_S, 120, 300, 0, sizing=SizingOptions(drain_s=60), forecast=options)
    specs = (pool("a", startup_s=60, scale=1.2), pool("b", startup_s=180))
    both = replay(arrivals, GuardedPolicy(specs, guards), spec, arrivals[:INTERVAL_S].sum(0))
    for index, one in enumerate(specs):
        forecaster = DemandForecaster(1, horizon_for(one.startup_s, INTERVAL_S, 120), options)
        plain = QuantilePolicy(forecaster, Sizing(10.0, SizingOptions(drain_s=60, scale=one.scale)))
        alone = replay(arrivals[:, index : index + 1], plain, spec, arrivals[:INTERVAL_S, index : index + 1].sum(0))
        different = np.flatnonzero(both.total[:, index] != alone.total[:, 0])
        assert len(different) <= 2  # where consolidation kept a replica
        assert np.all(both.total[different, index] > alone.total[different, 0])
    assert np.ptp(both.total) > 3


@given(st.data())
def test_promises_hold_in_any_history(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    options = GuardOptions(
        INTERVAL_S, 120, 300, 600, max_step_up=3, max_step_down=2, max_step_usd_per_hour=9.0, sizing=SizingOptions(minimum=0)
    )
    run = Run(
        GuardedPolicy((pool("a", usd_per_hour=2.0), pool("b", usd_per_hour=4.0), pool("c", usd_per_hour=0.5)), options)
    )
    for slot in range(60):
        if slot % 10 == 0:
            run.minimum = rng.integers(0, 3, 3)
            run.maximum = run.minimum + rng.integers(0, 12, 3)
        known = rng.random(3) > 0.2
        before = run.total.copy()
        rates = rng.choice([0.0, 5.0, 60.0, 600.0], 3)
        decision = run.step(*rates, known=known, backlog=float(rng.choice([0, 500])), ready=rng.integers(0, 8, 3))
        target, inside = decision.target, np.clip(before, run.minimum, run.maximum)
        assert np.all((target >= run.minimum) & (target <= run.maximum))
        np.testing.assert_array_equal(target[~known], inside[~known])
        base = np.maximum(before, run.minimum)
        assert np.all(target <= base + 3)
        assert np.all((target >= before - 2) | (target == run.maximum) | np.isin(decision.reason, ["idle"]))
        assert np.maximum(target - base, 0) @ np.array([2.0, 4.0, 0.5]) <= 9.0 + 1e-9
        assert set(decision.reason) <= set(REASONS)


def test_a_removal_leaves_what_the_load_of_now_needs() -> None:
    """A scale far too small wants too few; consolidation keeps what the current load fills, and says so."""
    run = Run(GuardedPolicy((pool(scale=0.3),), LOOSE))
    run.total = np.array([8])
    decisions = [run.step(55.0) for _ in range(12)]
    assert decisions[-1].wanted[0] < 3
    assert run.total[0] == 6
    assert {d.reason[0] for d in decisions[-5:]} == {"consolidation"}
    waiting = [run.step(15.0, backlog=2400.0) for _ in range(8)]  # 15/s, and 40/s more for a minute
    assert waiting[-1].target[0] == 6


def test_nothing_is_removed_before_enough_was_seen() -> None:
    options = GuardOptions(interval_s=INTERVAL_S, hold_s=120, idle_s=6000, warm_up_s=300)
    run = Run(GuardedPolicy((pool(),), options))
    run.total = np.array([9])
    early = [run.step(5.0) for _ in range(9)]
    assert [d.target[0] for d in early] == [9] * 9
    assert early[-1].reason == ("warm_up",)
    assert run.policy.states() == ("warming_up",)
    late = [run.step(5.0) for _ in range(4)]
    assert late[-1].target[0] == 1
    assert run.policy.states() == ("deciding",)


def test_idle_pools_go_to_minimum_or_zero_though_the_forecast_remembers() -> None:
    run = Run(GuardedPolicy((pool("a"), pool("b")), LOOSE), minimum=1)
    run.minimum = np.array([0, 2])
    for _ in range(20):
        run.step(80.0, 80.0)
    assert np.all(run.total >= 8)
    targets = [run.step(0.0, 0.0).target.tolist() for _ in range(10)]
    assert targets[8] != [0, 2]  # nine slots of 30 s are not 300 s
    assert targets[9] == [0, 2]
    woken = run.step(3.0, 0.0)
    assert woken.target.tolist() == [1, 2] or woken.target[0] > 1


def test_waiting_requests_are_not_idleness() -> None:
    run = Run(GuardedPolicy((pool(),), LOOSE), minimum=0)
    for _ in range(30):
        decision = run.step(0.0, backlog=1.0)
    assert decision.target[0] == 1


def test_silence_starts_the_idle_time_anew() -> None:
    """A pool that Serve woke is without metrics until its first replica serves: it must not go straight back to sleep."""
    run = Run(GuardedPolicy((pool(),), LOOSE), minimum=0)
    for _ in range(20):
        run.step(0.0)
    assert run.total[0] == 0
    run.total = np.array([1])  # woken
    assert run.step(0.0, known=False, ready=[0]).target[0] == 1
    assert [int(run.step(0.0).target[0]) for _ in range(10)] == [1] * 9 + [0]


def test_missing_metrics_hold_and_a_gap_is_filled_with_what_was_before() -> None:
    """A long outage neither removes nor orders, and the forecast after it is that of a series without the outage."""
    outage, steady = (Run(GuardedPolicy((pool(),), LOOSE)) for _ in range(2))
    for _ in range(10):
        outage.step(70.0)
        steady.step(70.0)
    held = [outage.step(0.0, known=False) for _ in range(40)]
    assert {(int(d.target[0]), d.reason[0]) for d in held} == {(int(held[0].target[0]), "no_metrics")}
    for _ in range(40):
        steady.step(70.0)
    assert outage.step(70.0).forecast == steady.step(70.0).forecast
    outage.time_s += 20 * INTERVAL_S  # the planner was away: 20 slots without any observation
    for _ in range(20):
        steady.step(70.0)
    assert outage.step(70.0).forecast == steady.step(70.0).forecast


def test_a_fourfold_step_is_one_order_and_a_huge_one_is_capped() -> None:
    free = Run(GuardedPolicy((pool(),), LOOSE))
    for _ in range(30):
        free.step(50.0)
    before = free.total[0]
    assert free.step(200.0).target[0] >= 20 > 2 * before
    capped = Run(GuardedPolicy((pool(),), GuardOptions(INTERVAL_S, 120, 300, 0, max_step_up=5)), maximum=50)
    for _ in range(30):
        capped.step(50.0)
    before = int(capped.total[0])
    targets = [int(capped.step(2000.0).target[0]) for _ in range(3)]
    assert targets == [before + 5, before + 10, before + 15]


def test_the_cost_cap_serves_the_pool_furthest_from_its_target() -> None:
    specs = (pool("cheap", usd_per_hour=1.0), pool("dear", usd_per_hour=5.0))
    run = Run(GuardedPolicy(specs, GuardOptions(INTERVAL_S, 120, 300, 0, max_step_usd_per_hour=12.0)))
    decision = run.step(200.0, 200.0)
    assert decision.target.tolist() == [3, 3]
    assert decision.reason == ("cost_cap", "cost_cap")
    for bad in ({"usd_per_hour": 0.0}, {"usd_per_hour": 13.0}):
        with pytest.raises(ValueError, match="usd_per_hour"):
            GuardedPolicy((pool(**bad),), GuardOptions(max_step_usd_per_hour=12.0))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity_per_s"):
        pool(capacity_per_s=float("nan"))
    with pytest.raises(ValueError, match="idle_s"):
        GuardOptions(interval_s=30, idle_s=10)
    with pytest.raises(ValueError, match="max_step_up"):
        GuardOptions(max_step_up=0)
