"""Fleet plans against every plan tried one by one, and the fast search against the solver's proof."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from app.cost.fleet import FleetProblem, PlanError, solve_exact
from app.cost.fleet_benchmark import random_fleet
from app.cost.fleet_columns import enumerate_candidates
from app.cost.fleet_exchange import _alternatives
from app.cost.fleet_search import solve_fast
from app.cost.plan import PlanRules, spread

PRICES = np.array([0.526, 0.8048, 1.006, 1.861, 2.745, 3.431, 6.88, 7.912])


def problem(seed: int, pools: int, options: int, total: float, degraded_share: float) -> FleetProblem:
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, pools + 1) ** 1.16
    demand = total * weight / weight.sum()
    speed = np.array([1.0, 1.9, 2.1, 4.2, 6.0, 7.0, 16.0, 19.0])[:options]
    capacity = speed * rng.uniform(0.75, 1.25, (pools, options))
    minimum = np.ones(pools, np.int64)
    return FleetProblem(demand, degraded_share * demand, minimum, capacity, PRICES[:options], np.full(options, np.inf))


def cheapest_by_trying(case: FleetProblem, most: int) -> float:
    pools, options = case.capacity.shape
    best = np.inf
    for flat in itertools.product(range(most + 1), repeat=pools * options):
        counts = np.array(flat).reshape(pools, options)
        if case.usd_per_hour(counts) < best and not case.violations(counts):
            best = case.usd_per_hour(counts)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("degraded_share", [0.0, 0.9])
def test_both_find_the_cheapest_of_all_plans(seed: int, degraded_share: float) -> None:
    pytest.importorskip("highspy")
    case = problem(seed, 1, 4, 4.7 + seed, degraded_share)
    best = cheapest_by_trying(case, 6)
    exact, fast = solve_exact(case), solve_fast(case)
    assert exact.usd_per_hour == pytest.approx(best)
    assert exact.bound_usd_per_hour <= best * (1 + 1e-9)
    assert fast.usd_per_hour == pytest.approx(best)


def test_quotas_are_shared_by_pools() -> None:
    pytest.importorskip("highspy")
    case = replace(problem(1, 2, 3, 5.0, 0.5), quota=np.array([1.0, np.inf, 1.0]))
    best = cheapest_by_trying(case, 4)
    assert solve_exact(case).usd_per_hour == pytest.approx(best)
    fast = solve_fast(case)
    assert case.violations(fast.counts) == []
    assert best <= fast.usd_per_hour <= 1.3 * best


@pytest.mark.parametrize(("total", "degraded_share"), [(1000, 0.0), (5000, 0.8)])
def test_fast_plans_of_200_pools_are_within_half_a_percent_of_the_proven_bound(total: float, degraded_share: float) -> None:
    pytest.importorskip("highspy")
    case = problem(0, 200, 8, total, degraded_share)
    fast = solve_fast(case)
    assert case.violations(fast.counts) == []
    exact = solve_exact(case)
    assert case.violations(exact.counts) == []
    assert exact.gap < 0.001
    assert fast.usd_per_hour <= 1.005 * exact.bound_usd_per_hour


@pytest.mark.parametrize("seed", range(16))
def test_binding_quotas_cost_at_most_half_a_percent_more_than_the_bound(seed: int) -> None:
    limited = random_fleet(seed, with_quotas=True)
    free = solve_fast(replace(limited, quota=np.full(8, np.inf)))
    assert (free.counts.sum(0) > limited.quota).any()
    fast = solve_fast(limited)
    assert limited.violations(fast.counts) == []
    assert fast.usd_per_hour <= 1.005 * fast.bound_usd_per_hour
    assert fast.bound_usd_per_hour >= free.bound_usd_per_hour - 1e-6


@pytest.mark.parametrize(("seed", "pools"), [(1, 30), (2, 30), (3, 30), (5, 6), (6, 6), (7, 6)])
def test_plans_under_quotas_are_near_the_solvers_own(seed: int, pools: int) -> None:
    pytest.importorskip("highspy")
    case = random_fleet(seed, pools, with_quotas=True)
    exact, fast = solve_exact(case, time_limit_s=5.0), solve_fast(case)
    assert case.violations(fast.counts) == []
    assert fast.usd_per_hour <= (1.005 if pools == 30 else 1.02) * exact.usd_per_hour


def test_every_alternative_of_an_exchange_keeps_the_pools_rules() -> None:
    case = random_fleet(4, 12, with_quotas=True)
    candidates = enumerate_candidates(case, split_shares=True)
    limited = np.flatnonzero(np.isfinite(case.quota))
    columns = candidates.worthwhile(case.price_usd_per_hour, limited)
    plan = solve_fast(case).counts
    room = np.where(np.isfinite(case.quota), 3.0, np.inf)
    for pool in range(12):
        alternatives = _alternatives(case, columns, pool, plan[pool], room)
        assert len(alternatives) > 10
        alone = replace(case.pool(pool), quota=np.full(8, np.inf))
        for counts in alternatives.astype(np.int64):
            assert alone.violations(counts[None]) == []


@pytest.mark.parametrize("seed", [1, 6, 7, 11])
def test_no_price_rise_makes_a_column_left_out_the_cheapest(seed: int) -> None:
    case = random_fleet(seed, 40, with_quotas=True)
    limited = np.flatnonzero(np.isfinite(case.quota))
    candidates = enumerate_candidates(case, split_shares=True)
    columns = candidates.worthwhile(case.price_usd_per_hour, limited)
    assert len(columns.pool) < 0.1 * candidates.n2.size
    rng = np.random.default_rng(seed)
    for mean in (0.1, 1.0, 10.0):
        extra = rng.exponential(mean, len(limited))
        price = case.price_usd_per_hour.copy()
        price[limited] += extra
        cheapest = columns.cheapest(extra)
        assert columns.pool[cheapest].tolist() == list(range(40))
        np.testing.assert_allclose(columns.cost(extra)[cheapest], candidates.cost(price).min(1))
        np.testing.assert_allclose(columns.counts[cheapest] @ price, columns.cost(extra)[cheapest])
        nearest = columns.nearest(extra, 3)
        assert (nearest[:, 0] == cheapest).mean() > 0.9  # ties apart
        assert (np.diff(columns.cost(extra)[nearest], axis=1) >= 0).all()


def test_a_pool_that_wants_nothing_gets_nothing_even_where_no_gpu_runs_it() -> None:
    case = random_fleet(2, 6, with_quotas=True)
    capacity, demand, minimum = case.capacity.copy(), case.demand.copy(), case.minimum.copy()
    capacity[3], demand[3], minimum[3] = 0.0, 0.0, 0
    case = replace(case, capacity=capacity, demand=demand, degraded=0.5 * demand, minimum=minimum)
    for quota in (case.quota, np.full(8, np.inf)):
        counts = solve_fast(replace(case, quota=quota)).counts
        assert counts[3].sum() == 0
        assert case.violations(counts) == [] or np.isinf(quota).all()


def test_a_gpu_that_does_not_run_the_model_is_not_used() -> None:
    case = problem(0, 5, 4, 30, 0.8)
    capacity = case.capacity.copy()
    capacity[:, 0] = 0.0
    capacity[2, 1] = 0.0
    counts = solve_fast(replace(case, capacity=capacity)).counts
    assert counts[:, 0].sum() == 0
    assert counts[2, 1] == 0
    with pytest.raises(PlanError, match="pool 2 fits no GPU"):
        capacity[2] = 0.0
        replace(case, capacity=capacity)


def test_what_cannot_be_met_says_what_stands_in_the_way() -> None:
    pytest.importorskip("highspy")
    case = replace(problem(0, 3, 2, 50, 0.8), quota=np.array([3.0, 2.0]))
    for solve in (solve_exact, solve_fast):
        with pytest.raises(PlanError, match="quotas"):
            solve(case)
    with pytest.raises(PlanError, match="negative"):
        replace(case, demand=np.array([1.0, -1.0, 2.0]))


@pytest.mark.parametrize(("seed", "zones"), [(0, 2), (1, 3), (2, 3)])
def test_a_plan_over_zones_survives_the_loss_of_any_zone_and_none_is_cheaper(seed: int, zones: int) -> None:
    pytest.importorskip("highspy")
    case = replace(problem(seed, 1, 3, 5.0 + seed, 0.9), zones=zones)

    def survives(counts: np.ndarray) -> bool:
        per_zone = np.array([spread(int(count), zones) for count in counts])  # [options, zones]
        left = [case.capacity[0] @ np.delete(per_zone, zone, axis=1).sum(1) for zone in range(zones)]
        return min(left) >= case.degraded[0] and case.capacity[0] @ counts >= case.demand[0] and counts.sum() >= 1

    best = min(
        case.usd_per_hour(np.array([flat])) for flat in itertools.product(range(14), repeat=3) if survives(np.array(flat))
    )
    exact = solve_exact(case)
    assert survives(exact.counts[0])
    assert case.violations(exact.counts) == []
    assert exact.usd_per_hour == pytest.approx(best)
    big = -(-case.demand[0] // case.capacity[0, 1])  # just enough of one option, until a zone is lost
    assert "losing a zone" in " ".join(case.violations(np.array([[0, int(big), 0]])))
    with pytest.raises(PlanError, match="zones"):
        solve_fast(case)
    with pytest.raises(PlanError, match="zones is 0"):
        replace(case, zones=0)
    with pytest.raises(PlanError, match="zones is 0"):
        PlanRules(zones=0)


def test_violations_name_each_broken_rule() -> None:
    case = replace(problem(0, 2, 2, 10, 0.9), quota=np.array([1.0, np.inf]))
    broken = " ".join(case.violations(np.array([[2, 0], [0, 0]])))
    assert "for a demand" in broken
    assert "after losing" in broken
    assert "minimum" in broken
    assert "over its quota" in broken
