"""`python -m app.cost.fleet_benchmark`: gap and time of the control loop's planner over random fleets; one JSON line last.

Instances: demands of Zipf form over the pools, capacities within a quarter of a GPU's usual speed, N+1 for half to all of
the demand, a replica at least per pool; half of the instances with quotas on one to five options, at 20 to 90 % of what a
plan without quotas would take. The gap is to the Lagrangian bound, which the best plan may not reach: an instance further
from it than 0.5 % is solved by HiGHS too, whose proven bound then counts. `--exact N` does so for the first N of each kind.
Times are of the process (cpu), which others on the machine disturb less, and as they passed (wall).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from app.cost.fleet import FleetProblem, PlanError, solve_exact
from app.cost.fleet_search import solve_fast

_PRICES = np.array([0.526, 0.8048, 1.006, 1.861, 2.745, 3.431, 6.88, 7.912])
_SPEED = np.array([1.0, 1.9, 2.1, 4.2, 6.0, 7.0, 16.0, 19.0])  # of a replica, in the first one's, usual
_WANTED_GAP = 0.005


def random_fleet(seed: int, num_pools: int = 200, with_quotas: bool = False) -> FleetProblem:
    """A problem over 8 options; the same seed gives the same one."""
    rng = np.random.default_rng(seed)
    total = float(np.exp(rng.uniform(np.log(200), np.log(5000))))
    weight = rng.permutation(1 / np.arange(1, num_pools + 1) ** rng.uniform(1.1, 1.4))
    demand = total * weight / weight.sum()
    capacity = _SPEED * rng.uniform(0.75, 1.25, (num_pools, len(_SPEED)))
    degraded, minimum = rng.uniform(0.5, 1.0) * demand, np.ones(num_pools, np.int64)
    problem = FleetProblem(demand, degraded, minimum, capacity, _PRICES, np.full(len(_PRICES), np.inf))
    if not with_quotas:
        return problem
    use = solve_fast(problem).counts.sum(0)
    quota = problem.quota.copy()
    limited = rng.permutation(np.flatnonzero(use))[: int(rng.integers(1, 6))]
    quota[limited] = np.floor(rng.uniform(0.2, 0.9, len(limited)) * use[limited])
    return replace(problem, quota=quota)


def measure(with_quotas: bool, num_instances: int, num_exact: int, exact_s: float) -> dict[str, float]:
    """Quantiles of gaps (shares of the bound) and seconds; prints what stands out."""
    gaps, from_bound, cpu_s, wall_s = [], [], [], []
    solve_fast(random_fleet(0, with_quotas=with_quotas))  # the first call imports and allocates
    for seed in range(num_instances):
        problem = random_fleet(seed, with_quotas=with_quotas)
        started, started_cpu = time.perf_counter(), time.process_time()
        plan = solve_fast(problem)
        cpu_s.append(time.process_time() - started_cpu)
        wall_s.append(time.perf_counter() - started)
        if broken := problem.violations(plan.counts):
            raise PlanError(f"instance {seed}: {broken[0]}")
        gap = plan.usd_per_hour / plan.bound_usd_per_hour - 1
        from_bound.append(gap)
        if seed < num_exact or gap > _WANTED_GAP:
            proven = plan.usd_per_hour / solve_exact(problem, time_limit_s=exact_s).bound_usd_per_hour - 1
            print(f"instance {seed}: {proven:.3%} over HiGHS's bound, {gap:.3%} over ours", flush=True)
            gap = min(gap, proven)
        gaps.append(gap)
    summary = {
        "instances": num_instances,
        "gap_p50": float(np.quantile(gaps, 0.5)),
        "gap_p99": float(np.quantile(gaps, 0.99)),
        "gap_max": max(gaps),
        "gap_to_own_bound_max": max(from_bound),
    }
    for name, seconds in (("cpu", cpu_s), ("wall", wall_s)):
        summary |= {f"{name}_p{share}_s": float(np.quantile(seconds, share / 100)) for share in (50, 99)}
        summary[f"{name}_max_s"] = max(seconds)
    return {name: round(value, 6) for name, value in summary.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=200, help="of each kind; default 200")
    parser.add_argument("--exact", type=int, default=0, metavar="N", help="of each kind solved by HiGHS too; default 0")
    parser.add_argument("--exact-seconds", type=float, default=20.0, metavar="S", help="for each of those; default 20")
    args = parser.parse_args(argv)
    if args.instances < 1:
        parser.error("--instances must be at least 1")
    kinds = {"without_quotas": False, "with_quotas": True}
    print(
        json.dumps({name: measure(with_, args.instances, args.exact, args.exact_seconds) for name, with_ in kinds.items()})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
