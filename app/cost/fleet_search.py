"""Fleet plans in milliseconds for the control loop: at most two GPU types per pool, all pools at once, in numpy.

Without quotas pools are independent and each takes its cheapest candidate. With quotas, app.cost.fleet_quotas prices them
and rounds.
"""

from __future__ import annotations

import numpy as np

from app.cost.fleet import FleetPlan, FleetProblem, PlanError, why_infeasible
from app.cost.fleet_columns import enumerate_candidates
from app.cost.fleet_quotas import plan_within_quotas


def solve_fast(problem: FleetProblem) -> FleetPlan:
    """A feasible plan; its bound is that of all plans of at most two types a pool (the tests measure the distance to the
    proven one).

    Raises PlanError when the quotas cannot be met, and for zones.
    """
    if problem.zones > 1:
        raise PlanError("plans over zones are solve_exact's; plan the control loop's fleet with zones 1")
    candidates = enumerate_candidates(problem, split_shares=False)
    cost = candidates.cost(problem.price_usd_per_hour)
    chosen = cost.argmin(1)
    counts = candidates.counts(chosen[:, None])[:, 0].astype(np.int64)
    if np.all(counts.sum(0) <= problem.quota):
        return FleetPlan(counts, problem.usd_per_hour(counts), float(cost[np.arange(len(cost)), chosen].sum()))
    found = plan_within_quotas(problem)
    if found is None:
        raise PlanError(why_infeasible(problem))
    return found
