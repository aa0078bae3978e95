"""Quotas shared by all pools: price them, round, repair.

With multipliers m >= 0 (USD per hour on top of the price of an option under quota) the pools come apart, and for any plan

    cost - bound(m) = sum over pools of its reduced cost + sum over quotas of m * room left

so a plan is as good as these two sums are small. Multipliers: Newton's method on the bound, smoothed by taking a softmin of
each pool's candidates at a falling temperature; candidates are generated at the multipliers found. Rounding: error diffusion
of the softmin's shares, which deals well with the many equal small pools. Repair: pools move one at a time to the candidate
that lowers the two sums and a growing fine on what is over a quota.

Letters: P pools, K candidates kept per pool, O options, L options under quota.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from app.cost.fleet import FleetPlan, FleetProblem
from app.cost.fleet_columns import Candidates, enumerate_candidates
from app.cost.fleet_exchange import exchange
from app.cost.traces import Floats, Ints

_COARSE = (0.5, 0.25, 0.12, 0.06)  # temperatures in shares of the lowest price, per round of candidate generation
_FINE = (0.05, 0.02, 0.008, 0.003)
_FINAL = (0.06, 0.03, 0.017, 0.01)
_MAX_ROUNDS = 3
_NUM_KEPT = 28
_NUM_FINAL = 40
_NUM_EXCHANGED = 8
_VERY_GOOD, _GOOD_ENOUGH = 0.0015, 0.004  # gaps at which no more is tried
_SOFT_FINES, _HARD_FINE = (0.2,), 100.0  # of a replica over quota, in prices of it, beside its multiplier
_NUM_CHEAP, _NUM_MOVES, _MAX_PAIR_MOVES = 4000, 150, 12
_FINES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0, 16.0, 64.0)  # on a replica over quota, in prices of it


@dataclass(frozen=True, slots=True)
class Priced:
    """Candidates kept, as the multipliers see them: counts float64[P, K, O], use float64[P, K, L] of what is under quota,
    plain float64[P, K] cost, quota and price float64[L].
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

    def soft(self, extra: Floats, temperature: float) -> tuple[float, Floats]:
        """(smoothed bound, shares float64[P, K] of the candidates) at multipliers float64[L]."""
        cost = self.plain + self.use @ extra
        lowest = cost.min(1)
        shares = np.exp((lowest[:, None] - cost) / temperature)
        total = shares.sum(1)
        return float((lowest - temperature * np.log(total)).sum() - extra @ self.quota), shares / total[:, None]

    def cheapest(self, extra: Floats, num_kept: int) -> Floats:
        """Counts float64[P, num_kept, O] of each pool's cheapest candidates at these multipliers."""
        if self.counts.shape[1] <= num_kept:
            return self.counts
        kept = np.argpartition(self.plain + self.use @ extra, num_kept - 1, axis=1)[:, :num_kept]
        return np.take_along_axis(self.counts, kept[:, :, None], 1)

    def ascend(self, extra: Floats, temperatures: Floats, accuracy: float = 3e-4, num_steps: int = 12) -> Floats:
        """Multipliers that maximise the smoothed bound, from `extra`, at each temperature in turn."""
        flat = self.use.reshape(-1, self.use.shape[2])
        for temperature in temperatures.tolist():
            value, shares = self.soft(extra, temperature)
            damping = 0.05
            for _ in range(num_steps):
                mean = (shares[:, None] @ self.use)[:, 0]
                over = mean.sum(0) - self.quota
                free = np.flatnonzero((extra > 0) | (over > 0))
                if len(free) == 0 or np.abs(over[free]).max() < 0.3:
                    break
                curvature = ((flat * shares.reshape(-1, 1)).T @ flat - mean.T @ mean) / temperature
                # The damping bounds a step to about price / damping.
                ridge = 1e-9 + damping * np.abs(over[free]).max() / self.price[free]
                step = np.zeros_like(extra)
                step[free] = np.linalg.solve(curvature[np.ix_(free, free)] + np.diag(ridge), over[free])
                moved = np.maximum(extra + step, 0.0)
                moved_value, moved_shares = self.soft(moved, temperature)
                if moved_value < value:
                    damping *= 6
                    continue
                small = moved_value - value < accuracy * abs(moved_value)
                extra, value, shares, damping = moved, moved_value, moved_shares, damping / 8
                if small:
                    break
        return extra


def plan_within_quotas(problem: FleetProblem) -> FleetPlan | None:
    """A feasible plan near the bound of all plans of at most two types a pool; None when none was found."""
    limited = np.flatnonzero(np.isfinite(problem.quota))
    candidates = enumerate_candidates(problem, split_shares=True)
    priced, extra, bound = _price_quotas(problem, candidates, limited)
    if bound > problem.usd_per_hour(_dearest(problem)):
        return None
    best: FleetPlan | None = None
    for soft_fine in _SOFT_FINES:
        counts = _integral(problem, candidates, priced, extra, bound, soft_fine)
        cost = problem.usd_per_hour(counts)
        if (counts.sum(0) <= problem.quota).all() and (best is None or cost < best.usd_per_hour):
            best = FleetPlan(counts, cost, bound)
        if best is not None and best.gap <= _GOOD_ENOUGH:
            break
    return best


def _integral(
    problem: FleetProblem, candidates: Candidates, priced: Priced, extra: Floats, bound: float, soft_fine: float
) -> Ints:
    """Counts int64[P, O], as a rule within the quotas: rounded, repaired, then adjusted until near the bound."""
    price, limited = problem.price_usd_per_hour, np.isfinite(problem.quota)
    rows = np.arange(len(priced.plain))
    chosen = _round(priced, extra, priced.soft(extra, _FINAL[-1] * float(price.min()))[1])
    rounded = priced.counts[rows, chosen].astype(np.int64)
    counts = priced.counts[rows, _repair(priced, extra, chosen.copy(), pairs=False)].astype(np.int64)
    if _within(problem, counts, bound * (1 + _VERY_GOOD)):
        return counts
    fine = soft_fine * price
    fine[limited] += extra
    large = np.argsort(-problem.demand, kind="stable")[:_NUM_EXCHANGED]
    counts = exchange(problem, candidates, rounded, large, fine, 2)
    for pairs in (False, True):
        own = Priced.of(np.concatenate([priced.counts, counts[:, None]], 1), problem, np.flatnonzero(limited))
        chosen = _repair(own, extra, np.full(len(rows), own.counts.shape[1] - 1), pairs)
        # Pools that a quota sends on a detour can use what is left.
        detour = own.plain[rows, chosen] - own.plain.min(1)
        dear = _reduced(own, extra)[rows, chosen]
        worth = np.union1d(np.argsort(-detour)[:_NUM_EXCHANGED], np.argsort(-dear)[:_NUM_EXCHANGED])
        worth = worth[np.argsort(-detour[worth], kind="stable")]
        counts = exchange(problem, candidates, own.counts[rows, chosen].astype(np.int64), worth, _HARD_FINE * price)
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


def _price_quotas(problem: FleetProblem, candidates: Candidates, limited: Ints) -> tuple[Priced, Floats, float]:
    """(candidates worth keeping, their multipliers float64[L], best bound)."""
    price, quota = problem.price_usd_per_hour, problem.quota[limited]
    unit = float(price.min())
    best, best_extra = -np.inf, np.zeros(len(limited))
    kept: list[Floats] = []

    def generate(extra: Floats, num_kept: int = 6) -> float:
        nonlocal best, best_extra
        at = price.copy()
        at[limited] += extra
        cost = candidates.cost(at)
        kept.append(candidates.counts(candidates.best_of_pairs(cost, num_kept)))
        bound = float(cost.min(1).sum() - extra @ quota)
        if bound > best:
            best, best_extra = bound, extra
        return bound

    # Starting points far apart: no quota dear, all of them, each alone.
    starts = [np.full(len(limited), share) for share in (0.0, 0.5, 2.0, 100.0)]
    starts += list(np.eye(len(limited))) if len(limited) > 1 else []
    for start in starts:
        generate(start * price[limited])
    for index in range(_MAX_ROUNDS):
        ladder = (_COARSE, _FINE)[min(index, 1)]
        priced = Priced.of(np.concatenate(kept, 1), problem, limited)
        extra = priced.ascend(best_extra, unit * np.array(ladder))
        kept = [priced.cheapest(extra, _NUM_KEPT)]
        before = best
        bound = generate(extra)
        if index >= 1 and bound <= before * (1 + 1e-4):
            break
        if bound < before:
            generate(0.5 * (extra + best_extra))
    generate(best_extra + 100 * price[limited])  # ways out, should rounding need them
    at = price.copy()
    at[limited] += best_extra
    kept.append(candidates.counts(candidates.cheapest(candidates.cost(at), _NUM_FINAL)))
    priced = Priced.of(np.concatenate(kept, 1), problem, limited)
    return priced, priced.ascend(best_extra, unit * np.array(_FINAL), 1e-5), best


def _reduced(priced: Priced, extra: Floats) -> Floats:
    cost = priced.plain + priced.use @ extra
    return np.asarray(cost - cost.min(1, keepdims=True))


def _round(priced: Priced, extra: Floats, shares: Floats) -> Ints:
    """int64[P] candidates whose use adds up to that of the shares; large pools, the easiest to adjust, come last."""
    reduced = _reduced(priced, extra)
    mean = np.einsum("pk,pkl->pl", shares, priced.use)
    owed = np.zeros(priced.use.shape[2])
    chosen = np.zeros(len(mean), np.int64)
    for pool in np.argsort(priced.plain.min(1), kind="stable").tolist():
        owed = owed + mean[pool]
        miss = np.abs(owed - priced.use[pool]) @ priced.price
        chosen[pool] = candidate = int((reduced[pool] + 0.3 * miss).argmin())
        owed = owed - priced.use[pool, candidate]
    return chosen


def _repair(priced: Priced, extra: Floats, chosen: Ints, pairs: bool) -> Ints:
    """int64[P] candidates from `chosen`, with less or nothing over quota; with `pairs` two pools may move at once."""
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
