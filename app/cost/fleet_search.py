"""Fleet plans in milliseconds for the control loop: at most two GPU types per pool, all pools at once, in numpy.

Every pair of types is enumerated around the bulk of the first. Without quotas pools are independent and each takes its
cheapest pair. Quotas are priced by Lagrange multipliers (subgradient), which also gives a lower bound; what is still over
a quota then moves to the pair that costs least per replica freed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.cost.fleet import FleetPlan, FleetProblem, PlanError, why_infeasible
from app.cost.traces import Floats, Ints

_SPREAD = 6  # replicas of the first type that the second may replace
_NEVER = 10**6  # replicas of a pair that must not be taken: too dear for any minimum
_NUM_ROUNDS = 40


@dataclass(frozen=True, slots=True)
class Pairs:
    """Candidate plans: options first, second int64[C] and their counts n1, n2 int64[P, C]."""

    first: Ints
    second: Ints
    n1: Ints
    n2: Ints

    def cost(self, price: Floats) -> Floats:
        """float64[P, C] at these prices."""
        return np.asarray(self.n1 * price[self.first] + self.n2 * price[self.second])

    def uses(self, option: int) -> Ints:
        """int64[P, C] replicas of one option."""
        return np.asarray(self.n1 * (self.first == option) + self.n2 * (self.second == option))

    def counts(self, chosen: Ints, num_options: int) -> Ints:
        """int64[P, O] of one candidate per pool, int64[P]."""
        rows = np.arange(len(chosen))
        counts = np.zeros((len(chosen), num_options), np.int64)
        counts[rows, self.first[chosen]] = self.n1[rows, chosen]
        counts[rows, self.second[chosen]] += self.n2[rows, chosen]
        return counts


def enumerate_pairs(problem: FleetProblem) -> Pairs:
    """All pairs of options; the first carries the bulk, up to 5 replicas fewer than it would need alone, the second the
    rest.
    """
    options = problem.capacity.shape[1]
    first, second, fewer = (
        grid.ravel() for grid in np.meshgrid(np.arange(options), np.arange(options), np.arange(_SPREAD), indexing="ij")
    )
    keep = ((first == second) & (fewer == 0)) | ((first != second) & (fewer > 0))
    first, second, fewer = first[keep], second[keep], fewer[keep]
    c1, c2 = problem.capacity[:, first], problem.capacity[:, second]
    runs = (c1 > 0) & (c2 > 0)
    c1, c2 = np.where(runs, c1, 1.0), np.where(runs, c2, 1.0)
    demand, minimum = problem.demand[:, None], problem.minimum[:, None]
    spare = np.where(problem.degraded > 0, problem.degraded, -np.inf)[:, None]  # no N+1 where nothing must survive
    alone = np.maximum(np.ceil(np.maximum(demand, spare + c1) / c1 - 1e-9), minimum)
    n1 = np.maximum(alone - fewer, 0)
    # With both in use the larger may be the one that fails.
    need = np.maximum(demand, spare + np.maximum(np.where(n1 > 0, c1, 0.0), c2))
    n2 = np.maximum(np.maximum(np.ceil((need - c1 * n1) / c2 - 1e-9), minimum - n1), 0)
    n2 = np.where(fewer == 0, 0, n2)
    never = ~runs | ((n2 == 0) & (n1 < alone))
    return Pairs(first, second, np.where(never, _NEVER, n1).astype(np.int64), np.where(never, 0, n2).astype(np.int64))


def solve_fast(problem: FleetProblem) -> FleetPlan:
    """A feasible plan; its bound is that of all two-type plans (the tests measure the distance to the proven one).

    Raises PlanError when the quotas cannot be met.
    """
    pairs = enumerate_pairs(problem)
    options = len(problem.price_usd_per_hour)
    cost = pairs.cost(problem.price_usd_per_hour)
    chosen = cost.argmin(1)
    counts = pairs.counts(chosen, options)
    if np.all(counts.sum(0) <= problem.quota):
        return FleetPlan(counts, problem.usd_per_hour(counts), float(cost.min(1).sum()))
    pairs = _promising(pairs, problem)
    extra, bound = _price_quotas(pairs, problem)
    counts = _repair(pairs, problem, extra)
    return FleetPlan(counts, problem.usd_per_hour(counts), bound)


def _promising(pairs: Pairs, problem: FleetProblem) -> Pairs:
    """The candidates that are best or nearly best for some pool, and every single-type one: fewer to price in every
    round.
    """
    cost = pairs.cost(problem.price_usd_per_hour)
    rank = np.argpartition(cost, min(24, cost.shape[1] - 1), axis=1)[:, :24]
    keep = np.zeros(cost.shape[1], bool)
    keep[np.unique(rank)] = True
    keep |= pairs.first == pairs.second
    return Pairs(pairs.first[keep], pairs.second[keep], pairs.n1[:, keep], pairs.n2[:, keep])


def _price_quotas(pairs: Pairs, problem: FleetProblem) -> tuple[Floats, float]:
    """(multipliers float64[O] USD per hour, best lower bound) by projected subgradient steps."""
    price, limited = problem.price_usd_per_hour, np.isfinite(problem.quota)
    limit = np.where(limited, problem.quota, 0.0)
    extra, best_extra, best = np.zeros(len(price)), np.zeros(len(price)), -np.inf
    for index in range(_NUM_ROUNDS):
        cost = pairs.cost(price + extra)
        chosen = cost.argmin(1)
        value = float(cost[np.arange(len(chosen)), chosen].sum()) - float(extra @ limit)
        if value > best:
            best, best_extra = value, extra
        over = np.where(limited, pairs.counts(chosen, len(price)).sum(0) - problem.quota, 0.0)
        if not over.any():
            break
        # Relative to the larger of quota and use, so that a quota of 0 is priced out as fast as any other.
        scale = np.maximum(limit + np.maximum(over, 0.0), 1.0)
        extra = np.maximum(extra + price * over / scale / (1 + 0.2 * index), 0.0)
    return best_extra, best


def _repair(pairs: Pairs, problem: FleetProblem, extra: Floats) -> Ints:
    """From the cheapest at priced quotas to a feasible plan: move pools off the options over quota, then take back what
    got room.
    """
    price, quota = problem.price_usd_per_hour, problem.quota
    options = len(price)
    plain = pairs.cost(price)
    chosen = pairs.cost(price + extra).argmin(1)
    counts = pairs.counts(chosen, options)
    rows = np.arange(len(chosen))
    for _ in range(4 * len(chosen)):
        room = quota - counts.sum(0)
        if not (room < 0).any():
            return _take_back(pairs, problem, chosen)
        option = int(room.argmin())
        freed = counts[:, option, None] - pairs.uses(option)
        # A move may not fill another quota beyond its room, nor make one that is over already worse.
        fits = (freed > 0) & np.all(
            [
                pairs.uses(o) - counts[:, o, None] <= max(room[o], 0.0)
                for o in range(options)
                if o != option and np.isfinite(quota[o])
            ],
            axis=0,
        )
        # Only what the quota asks for earns: moving a large pool for a small excess would pay for nothing.
        earned = np.minimum(np.maximum(freed, 1), -room[option])
        dearer = np.where(fits, (plain - plain[rows, chosen][:, None]) / earned, np.inf)
        pool, candidate = divmod(int(dearer.argmin()), plain.shape[1])
        if not np.isfinite(dearer[pool, candidate]):
            raise PlanError(why_infeasible(problem))
        chosen[pool] = candidate
        counts[pool] = pairs.counts(chosen, options)[pool]
    raise PlanError(why_infeasible(problem))


def _take_back(pairs: Pairs, problem: FleetProblem, chosen: Ints) -> Ints:
    """Pool by pool, dearest detour first: the cheapest candidate that the quotas have room for."""
    options = len(problem.price_usd_per_hour)
    plain = pairs.cost(problem.price_usd_per_hour)
    counts = pairs.counts(chosen, options)
    used = counts.sum(0)
    detour = plain[np.arange(len(chosen)), chosen] - plain.min(1)
    columns = np.arange(plain.shape[1])
    for pool in np.argsort(-detour, kind="stable"):
        if detour[pool] <= 0:
            break
        need = np.zeros((plain.shape[1], options))
        need[columns, pairs.first] += pairs.n1[pool]
        need[columns, pairs.second] += pairs.n2[pool]
        fits = np.all(need <= problem.quota - (used - counts[pool]), axis=1)
        best = int(np.where(fits, plain[pool], np.inf).argmin())
        used = used - counts[pool] + need[best].astype(np.int64)
        counts[pool] = need[best]
    return counts
