"""Quotas shared by all pools: price them, round, repair.

With multipliers m >= 0 (USD per hour on top of the price of an option under quota) the pools come apart, and for any plan

    cost - bound(m) = sum over pools of its reduced cost + sum over quotas of m * room left

so a plan is as good as these two sums are small. Multipliers: Newton's method on the bound, smoothed by taking a softmin of
each pool's columns at a falling temperature. Only columns that no other beats in cost and in every use count
(`Candidates.worthwhile`): a tenth of them or less. Rounding: error diffusion of the softmin's shares, which deals well with
the many equal small pools. Repair: pools move one at a time to the column that lowers the two sums and a growing fine on
what is over a quota. What is then still far from the bound is tried once more from the multipliers of a warmer softmin.

Letters: P pools, K columns kept per pool, N columns of all pools, O options, L options under quota.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from app.cost.fleet import FleetPlan, FleetProblem
from app.cost.fleet_columns import Columns, enumerate_candidates
from app.cost.fleet_exchange import exchange
from app.cost.traces import Floats, Ints

_TEMPERATURES = (4.0, 1.0, 0.25, 0.06, 0.02)  # in shares of the lowest price
_COLDEST = 0.002  # for the bound alone
_MAX_STEPS, _ACCURACY = 30, 1e-6  # of Newton's method; it stops when a step gains less than this share of the bound
_KEPT = 0.3  # replicas by which the shares may miss a quota
_FIRST_RADIUS, _DAMPING = 0.25, 0.02  # of a step, in prices
_NUM_KEPT = 24
_MAX_ATTEMPTS = 2
_NUM_EXCHANGED = 8
_VERY_GOOD, _GOOD_ENOUGH = 0.003, 0.0045  # gaps at which no more is tried
_SOFT_FINE, _HARD_FINE = 0.2, 100.0  # of a replica over quota, in prices of it, beside its multiplier
_NUM_CHEAP, _NUM_MOVES, _MAX_PAIR_MOVES = 4000, 150, 12
_FINES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0, 16.0, 64.0)  # on a replica over quota, in prices of it


@dataclass(frozen=True, slots=True)
class Priced:
    """Columns kept for rounding, as the multipliers see them: counts float64[P, K, O], use float64[P, K, L] of what is under
    quota, plain float64[P, K] cost, quota and price float64[L].
    """

    counts: Floats
    use: Floats
    plain: Floats
    quota: Floats
    price: Floats

    @classmethod
    def of(cls, counts: Floats, problem: FleetProblem, limited: Ints) -> Self:
        """From counts of the problem's options, those at `limited` int64[L] being under quota."""
        price = problem.price_usd_per_hour
        return cls(
            counts, np.ascontiguousarray(counts[:, :, limited]), counts @ price, problem.quota[limited], price[limited]
        )


def _soft(columns: Columns, quota: Floats, extra: Floats, temperature: float) -> tuple[float, Floats]:
    """(smoothed bound, shares float64[N] of the columns) at multipliers float64[L]."""
    cost = columns.cost(extra)
    lowest = np.minimum.reduceat(cost, columns.start)
    shares = np.exp((lowest[columns.pool] - cost) / temperature)
    total = np.add.reduceat(shares, columns.start)
    shares /= total[columns.pool]
    return float((lowest - temperature * np.log(total)).sum() - extra @ quota), shares


def _ascend(columns: Columns, quota: Floats, price: Floats, extra: Floats, temperature: float) -> Floats:
    """Multipliers that maximise the smoothed bound, from `extra`: Newton's method within a trust radius."""
    value, shares = _soft(columns, quota, extra, temperature)
    radius = _FIRST_RADIUS
    over = curvature = None
    for _ in range(_MAX_STEPS):
        if over is None or curvature is None:
            weighted = columns.use * shares[:, None]
            mean = np.add.reduceat(weighted, columns.start)
            over = mean.sum(0) - quota
            curvature = (weighted.T @ columns.use - mean.T @ mean) / temperature
        free = np.flatnonzero((extra > 0) | (over > 0))
        if len(free) == 0 or np.abs(over[free]).max() < _KEPT:
            break
        step = np.zeros_like(extra)
        ridge = 1e-9 + _DAMPING * np.abs(over[free]) / price[free]
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)] + np.diag(ridge), over[free])
        length = float(np.abs(step / price).max())
        moved = np.maximum(extra + step * min(1.0, radius / length), 0.0)
        moved_value, moved_shares = _soft(columns, quota, moved, temperature)
        if moved_value < value:
            radius = 0.25 * min(radius, length)
            continue
        radius = 2 * radius if length > radius else radius
        small = moved_value - value < _ACCURACY * abs(moved_value)
        extra, value, shares, over = moved, moved_value, moved_shares, None
        if small:
            break
    return extra


def plan_within_quotas(problem: FleetProblem) -> FleetPlan | None:
    """A feasible plan near the bound of all plans of at most two types a pool; None when none was found."""
    limited = np.flatnonzero(np.isfinite(problem.quota))
    candidates = enumerate_candidates(problem, split_shares=True)
    columns = candidates.worthwhile(problem.price_usd_per_hour, limited)
    found, bound = _price_quotas(problem, columns, limited)
    if bound > problem.usd_per_hour(_dearest(problem)):
        return None
    best: FleetPlan | None = None
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        temperature = _TEMPERATURES[-attempt] * float(problem.price_usd_per_hour.min())
        counts = _integral(problem, columns, found[-attempt], temperature, bound)
        cost = problem.usd_per_hour(counts)
        if (counts.sum(0) <= problem.quota).all() and (best is None or cost < best.usd_per_hour):
            best = FleetPlan(counts, cost, bound)
        if best is not None and best.gap <= _GOOD_ENOUGH:
            break
    return best


def _integral(problem: FleetProblem, columns: Columns, extra: Floats, temperature: float, bound: float) -> Ints:
    """Counts int64[P, O], as a rule within the quotas: rounded, repaired, then adjusted until near the bound."""
    price, limited = problem.price_usd_per_hour, np.isfinite(problem.quota)
    kept = columns.nearest(extra, _NUM_KEPT)
    way_out = columns.cheapest(extra + 100 * price[limited])
    priced = Priced.of(columns.counts[np.concatenate([kept, way_out[:, None]], 1)], problem, np.flatnonzero(limited))
    rows = np.arange(len(priced.plain))
    shares = _soft(columns, problem.quota[limited], extra, temperature)[1]
    mean = np.add.reduceat(columns.use * shares[:, None], columns.start)
    chosen = _round(priced, extra, mean)
    rounded = priced.counts[rows, chosen].astype(np.int64)
    counts = priced.counts[rows, _repair(priced, extra, chosen.copy(), pairs=False)].astype(np.int64)
    if _within(problem, counts, bound * (1 + _VERY_GOOD)):
        return counts
    fine = _SOFT_FINE * price
    fine[limited] += extra
    large = np.argsort(-problem.demand, kind="stable")[:_NUM_EXCHANGED]
    counts = exchange(problem, columns, rounded, large, fine, 2)
    for pairs in (False, True):
        own = Priced.of(np.concatenate([priced.counts, counts[:, None]], 1), problem, np.flatnonzero(limited))
        chosen = _repair(own, extra, np.full(len(rows), own.counts.shape[1] - 1), pairs)
        # Pools that a quota sends on a detour can use what is left.
        detour = own.plain[rows, chosen] - own.plain.min(1)
        dear = _reduced(own, extra)[rows, chosen]
        worth = np.union1d(np.argsort(-detour)[:_NUM_EXCHANGED], np.argsort(-dear)[:_NUM_EXCHANGED])
        worth = worth[np.argsort(-detour[worth], kind="stable")]
        counts = exchange(problem, columns, own.counts[rows, chosen].astype(np.int64), worth, _HARD_FINE * price)
        if _within(problem, counts, bound * (1 + _GOOD_ENOUGH)):
            break
    return counts


def _within(problem: FleetProblem, counts: Ints, usd_per_hour: float) -> bool:
    return bool((counts.sum(0) <= problem.quota).all()) and problem.usd_per_hour(counts) <= usd_per_hour


def _dearest(problem: FleetProblem) -> Ints:
    """int64[P, O]: more than any sensible plan costs: each pool alone on each of its options, all of them."""
    capacity = np.where(problem.capacity > 0, problem.capacity, np.inf)
    need = np.maximum(problem.demand, problem.degraded)[:, None]
    return np.asarray(np.ceil(need / capacity) + problem.minimum[:, None] + 1, np.int64)


def _price_quotas(problem: FleetProblem, columns: Columns, limited: Ints) -> tuple[list[Floats], float]:
    """(multipliers float64[L] at which the softmin's shares keep the quotas, for each of _TEMPERATURES, bound)."""
    price, quota = problem.price_usd_per_hour, problem.quota[limited]
    extra, bound, found = np.zeros(len(limited)), -np.inf, []
    for temperature in (*_TEMPERATURES, _COLDEST):
        extra = _ascend(columns, quota, price[limited], extra, temperature * float(price.min()))
        bound = max(bound, float(np.minimum.reduceat(columns.cost(extra), columns.start).sum() - extra @ quota))
        found.append(extra)
    return found[:-1], bound


def _reduced(priced: Priced, extra: Floats) -> Floats:
    cost = priced.plain + priced.use @ extra
    return np.asarray(cost - cost.min(1, keepdims=True))


def _round(priced: Priced, extra: Floats, mean: Floats) -> Ints:
    """int64[P] columns whose use adds up to mean float64[P, L]; large pools, the easiest to adjust, come last."""
    reduced = _reduced(priced, extra)
    owed = np.zeros(priced.use.shape[2])
    chosen = np.zeros(len(mean), np.int64)
    for pool in np.argsort(priced.plain.min(1), kind="stable").tolist():
        owed = owed + mean[pool]
        miss = np.abs(owed - priced.use[pool]) @ priced.price
        chosen[pool] = candidate = int((reduced[pool] + 0.3 * miss).argmin())
        owed = owed - priced.use[pool, candidate]
    return chosen


def _repair(priced: Priced, extra: Floats, chosen: Ints, pairs: bool) -> Ints:
    """int64[P] columns from `chosen`, with less or nothing over quota; with `pairs` two pools may move at once."""
    reduced, pools = _reduced(priced, extra), np.arange(len(chosen))
    room = priced.quota - priced.use[pools, chosen].sum(0)
    for share in _FINES:
        fine = share * priced.price
        for _ in range(3):
            left = room + priced.use[pools, chosen][:, None] - priced.use
            value = reduced + np.maximum(extra * left, -fine * left).sum(2)
            gain = value[pools, chosen] - value.min(1)
            moved = False
            for pool in np.argsort(-gain, kind="stable")[: int((gain > 1e-9).sum())].tolist():
                use = priced.use[pool]
                left_of = room + use[chosen[pool]] - use
                value_of = reduced[pool] + np.maximum(extra * left_of, -fine * left_of).sum(1)
                best = int(value_of.argmin())
                if value_of[best] < value_of[chosen[pool]] - 1e-9:
                    room, chosen[pool], moved = left_of[best], best, True
            if not moved:
                break
        if share >= 0.4 and (room >= 0).all():
            break
    if pairs:
        _move_pairs(priced, extra, chosen, reduced, 8 * priced.price)
    return chosen


def _move_pairs(priced: Priced, extra: Floats, chosen: Ints, reduced: Floats, fine: Floats) -> None:
    """Change `chosen` by moves of two pools at once while that lowers the gap: the cheapest moves of each effect."""
    pools, kept = np.arange(len(chosen)), priced.use.shape[1]
    weights = np.random.default_rng(0).random(priced.use.shape[2])
    for _ in range(_MAX_PAIR_MOVES):
        room = priced.quota - priced.use[pools, chosen].sum(0)
        dearer = (reduced - reduced[pools, chosen][:, None]).ravel()
        taken = (priced.use - priced.use[pools, chosen][:, None]).reshape(-1, len(room))
        cheap = np.argsort(dearer, kind="stable")[:_NUM_CHEAP]
        _, first = np.unique(taken[cheap] @ weights, return_index=True)
        moves = cheap[np.sort(first)[:_NUM_MOVES]]
        left = room - taken[moves][:, None] - taken[moves][None]
        value = dearer[moves][:, None] + dearer[moves][None] + np.maximum(extra * left, -fine * left).sum(2)
        value[moves[:, None] // kept == moves[None] // kept] = np.inf
        one, other = divmod(int(value.argmin()), len(moves))
        if value[one, other] > np.maximum(extra * room, -fine * room).sum() - 1e-9:
            return
        for move in (moves[one], moves[other]):
            chosen[move // kept] = move % kept
