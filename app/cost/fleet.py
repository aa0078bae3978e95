"""The integer programme of a fleet, and two ways to solve it.

Pools p, options o (a GPU type under one purchase), n[p, o] replicas:

    minimise   sum price[o] n[p, o]
    subject to sum_o capacity[p, o] n[p, o] >= demand[p]                                  enough for the forecast
               sum_o capacity[p, o] n[p, o] - capacity[p, g] >= degraded[p]  for g in use  one replica may fail (N+1)
               sum_o n[p, o] >= minimum[p]
               sum_p n[p, o] <= quota[o]                                                  shared by all pools

Over Z zones, each option's replicas spread evenly, a whole zone may fail instead of one replica:

               sum_o capacity[p, o] (n[p, o] - ceil(n[p, o] / Z)) >= degraded[p]

`solve_exact` (HiGHS) proves how far it can be from the best; app.cost.fleet_search solves in milliseconds for the control
loop. Capacity 0 means the model does not run there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from app.cost.traces import Floats, Ints

if TYPE_CHECKING:
    import highspy


class PlanError(ValueError):
    """No plan meets the constraints; the message names which one and what would help."""


@dataclass(frozen=True, slots=True)
class FleetProblem:
    """demand, degraded float64[P] requests/s; minimum int64[P]; capacity float64[P, O] requests/s of one replica;
    price_usd_per_hour float64[O]; quota float64[O] replicas, inf where there is none. zones: 1 plans for the loss of a
    replica, more for the loss of a zone.
    """

    demand: Floats
    degraded: Floats
    minimum: Ints
    capacity: Floats
    price_usd_per_hour: Floats
    quota: Floats
    zones: int = 1

    def __post_init__(self) -> None:
        pools, options = self.capacity.shape
        if self.demand.shape != (pools,) or self.degraded.shape != (pools,) or self.minimum.shape != (pools,):
            raise PlanError(f"demand, degraded and minimum need one value for each of {pools} pools")
        if self.price_usd_per_hour.shape != (options,) or self.quota.shape != (options,):
            raise PlanError(f"prices and quotas need one value for each of {options} options")
        if self.zones < 1:
            raise PlanError(f"zones is {self.zones}; it must be at least 1")
        if not (np.all(np.isfinite(self.demand)) and np.all(self.demand >= 0) and np.all(self.degraded >= 0)):
            raise PlanError("a demand is negative or not a number; demands are requests per second")
        stuck = np.flatnonzero((self.capacity.max(1, initial=0.0) <= 0) & ((self.demand > 0) | (self.minimum > 0)))
        if len(stuck):
            raise PlanError(f"pool {stuck[0]} fits no GPU type within its latency target; allow more time or a larger GPU")

    def pool(self, index: int) -> FleetProblem:
        """One pool alone."""
        one = slice(index, index + 1)
        return replace(
            self,
            demand=self.demand[one],
            degraded=self.degraded[one],
            minimum=self.minimum[one],
            capacity=self.capacity[one],
        )

    def lost(self, counts: Ints) -> Floats:
        """Requests/s that each pool of a plan int64[P, O] loses at worst with one replica, or with one zone: float64[P]."""
        if self.zones > 1:
            return np.asarray((self.capacity * -(-counts // self.zones)).sum(1))
        return np.asarray(np.where(counts > 0, self.capacity, 0.0).max(1))

    def usd_per_hour(self, counts: Ints) -> float:
        """Price of a plan int64[P, O]."""
        return float(counts.sum(0) @ self.price_usd_per_hour)

    def violations(self, counts: Ints) -> list[str]:
        """What a plan breaks, in words; empty when it is feasible."""
        total = (self.capacity * counts).sum(1)
        slack = 1e-6 * np.maximum(self.demand, 1.0)
        lost = "replica" if self.zones == 1 else "zone"
        after_loss = total - self.lost(counts)
        broken = [
            f"pool {pool}: {total[pool]:.3f}/s for a demand of {self.demand[pool]:.3f}/s"
            for pool in np.flatnonzero(total < self.demand - slack)
        ]
        broken += [
            f"pool {pool}: {after_loss[pool]:.3f}/s after losing a {lost}, {self.degraded[pool]:.3f}/s wanted"
            for pool in np.flatnonzero(after_loss < self.degraded - slack)
        ]
        broken += [f"pool {pool}: fewer replicas than its minimum" for pool in np.flatnonzero(counts.sum(1) < self.minimum)]
        broken += [f"option {option}: over its quota" for option in np.flatnonzero(counts.sum(0) > self.quota)]
        if np.any(counts[self.capacity <= 0] > 0):
            broken.append("a replica where the model does not run")
        return broken


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """counts int64[P, O]; usd_per_hour; bound_usd_per_hour no plan can be cheaper than (0 when not known)."""

    counts: Ints
    usd_per_hour: float
    bound_usd_per_hour: float

    @property
    def gap(self) -> float:
        """How much of the price could be saved at most, as a share of it."""
        return 0.0 if self.usd_per_hour == 0 else max(0.0, 1.0 - self.bound_usd_per_hour / self.usd_per_hour)


def solve_exact(problem: FleetProblem, max_gap: float = 1e-4, time_limit_s: float = 30.0) -> FleetPlan:
    """The cheapest plan by HiGHS, to a proven gap. Raises PlanError when the constraints cannot be met together.

    Without quotas the pools are independent and are solved one by one, which proves more in less time.
    """
    pools = len(problem.demand)
    if np.isfinite(problem.quota).any():
        return _solve_together(problem, max_gap, time_limit_s)
    parts = [_solve_together(problem.pool(pool), max_gap, time_limit_s / pools) for pool in range(pools)]
    counts = np.concatenate([part.counts for part in parts])
    return FleetPlan(counts, problem.usd_per_hour(counts), sum(part.bound_usd_per_hour for part in parts))


def _solve_together(problem: FleetProblem, max_gap: float, time_limit_s: float) -> FleetPlan:
    try:
        import highspy
    except ImportError as error:
        raise PlanError("exact plans need the solver HiGHS; install it with: pip install highspy==1.12.0") from error

    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("mip_rel_gap", max_gap)
    solver.setOptionValue("time_limit", max(time_limit_s, 1.0))
    solver.passModel(_mixed_integer_model(problem))
    solver.run()
    status = solver.getModelStatus()
    info = solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        raise PlanError(why_infeasible(problem))
    if info.primal_solution_status != int(highspy.SolutionStatus.kSolutionStatusFeasible):
        raise PlanError(f"no plan found in {time_limit_s:g} s; allow more time")
    size = problem.capacity.size
    counts = np.rint(np.array(solver.getSolution().col_value[:size])).astype(np.int64).reshape(problem.capacity.shape)
    return FleetPlan(counts, problem.usd_per_hour(counts), float(info.mip_dual_bound))


def _mixed_integer_model(problem: FleetProblem) -> highspy.HighsLp:
    """HiGHS model: columns n[p, o] row by row, then largest[p, o], one of which is 1: the largest option pool p may use; or,
    over zones, at least the replicas of o in a zone.

    Naming the largest needs one row for N+1 where a switch per option would need as many, each with a big M.
    """
    import highspy

    pools, options = problem.capacity.shape
    size = pools * options
    runs = problem.capacity > 0
    spare = 1.0 if problem.zones == 1 else problem.zones / (problem.zones - 1)  # what a zone carries, the others must
    need = spare * np.maximum(problem.demand, problem.degraded)[:, None] + problem.zones * problem.capacity.max(
        1, keepdims=True
    )
    most = np.where(runs, np.ceil(need / np.where(runs, problem.capacity, 1.0)) + problem.minimum[:, None], 0.0)
    rows: list[tuple[float, float, list[int], list[float]]] = []
    for pool in range(pools):
        columns = [pool * options + option for option in range(options)]
        capacity = problem.capacity[pool].tolist()
        rows.append((float(problem.demand[pool]), math.inf, columns, capacity))
        rows.append((float(problem.minimum[pool]), math.inf, columns, [1.0] * options))
        if problem.degraded[pool] > 0 and problem.zones > 1:
            in_a_zone = [size + column for column in columns]
            lost = [-value for value in capacity]
            rows.append((float(problem.degraded[pool]), math.inf, [*columns, *in_a_zone], [*capacity, *lost]))
            rows += [(0.0, math.inf, [size + column, column], [float(problem.zones), -1.0]) for column in columns]
        elif problem.degraded[pool] > 0:
            largest = [size + column for column in columns]
            rows.append((1.0, 1.0, largest, [1.0] * options))
            lost = [-value for value in capacity]
            rows.append((float(problem.degraded[pool]), math.inf, [*columns, *largest], [*capacity, *lost]))
            rows.append((2.0, math.inf, columns, [1.0] * options))
            for option in np.flatnonzero(runs[pool]).tolist():
                allowed = [largest[other] for other in range(options) if capacity[other] >= capacity[option]]
                limit = -float(most[pool, option])
                rows.append((-math.inf, 0.0, [columns[option], *allowed], [1.0, *[limit] * len(allowed)]))
    rows += [
        (-math.inf, float(problem.quota[option]), list(range(option, size, options)), [1.0] * pools)
        for option in np.flatnonzero(np.isfinite(problem.quota)).tolist()
    ]
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = 2 * size, len(rows)
    model.col_cost_ = np.concatenate([np.tile(problem.price_usd_per_hour, pools), np.zeros(size)])
    model.col_lower_ = np.zeros(2 * size)
    model.col_upper_ = np.concatenate([most.ravel(), np.ones(size) if problem.zones == 1 else most.ravel()])
    model.integrality_ = [highspy.HighsVarType.kInteger] * (2 * size)
    model.row_lower_ = np.array([row[0] for row in rows])
    model.row_upper_ = np.array([row[1] for row in rows])
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(row[2]) for row in rows])]).astype(np.int32)
    model.a_matrix_.index_ = np.concatenate([row[2] for row in rows]).astype(np.int32)
    model.a_matrix_.value_ = np.concatenate([row[3] for row in rows])
    return model


def why_infeasible(problem: FleetProblem) -> str:
    """Which quotas stand in the way, in words."""
    most = np.where(np.isfinite(problem.quota), problem.quota, np.inf)
    capped = [f"option {option} at {quota:g}" for option, quota in enumerate(most.tolist()) if math.isfinite(quota)]
    if not capped:
        return "the pools cannot be served: check demands, minimum counts and capacities"
    return f"the quotas ({', '.join(capped)}) do not hold the pools' demands, minimums and N+1; raise one or add a GPU"
