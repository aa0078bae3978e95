"""Candidate plans of single pools ("columns"): one or two options each, all pools at once, in numpy.

Letters: P pools, O options, L options under quota, C candidates of each pool, N columns of all pools worth looking at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from app.cost.fleet import FleetProblem
from app.cost.traces import Floats, Ints

Bools = npt.NDArray[np.bool_]

_NEAR = 5  # first so many replicas of the bulk's option, one by one
_SHARES = 6  # then so many shares of it: a large pool that a quota splits needs them
_NEVER = 1e6  # replicas of a pair that must not be taken: too dear for any minimum


@dataclass(frozen=True, slots=True)
class Candidates:
    """Counts of a first option, n1 float64[P, O, 1, S], and of a second, n2 float64[P, O, O, S], for S splits between them.

    A candidate is an index into [O, O, S] laid flat (C of them).
    """

    n1: Floats
    n2: Floats

    def cost(self, price: Floats) -> Floats:
        """float64[P, C] at these prices float64[O]."""
        cost = self.n2 * price[:, None]
        cost += self.n1 * price[:, None, None]
        return cost.reshape(len(cost), -1)

    def counts(self, chosen: Ints) -> Floats:
        """float64[P, K, O] replicas of the candidates int64[P, K]."""
        first, second, split = np.unravel_index(chosen, self.n2.shape[1:])
        pools, kept = np.ogrid[: chosen.shape[0], : chosen.shape[1]]
        counts = np.zeros((*chosen.shape, self.n2.shape[1]))
        counts[pools, kept, first] = self.n1[pools, first, 0, split]
        counts[pools, kept, second] += self.n2[pools, first, second, split]
        return counts

    def worthwhile(self, price: Floats, limited: Ints) -> Columns:
        """The columns that may be cheapest for some prices not below these float64[O], of which those of the options limited
        int64[L] may rise: no other column of the pool is as cheap and uses as little of each. (Some others stay too.)
        """
        pool, candidate = np.nonzero(self.n2.reshape(len(self.n2), -1) < _NEVER)
        first, second, split = np.unravel_index(candidate, self.n2.shape[1:])
        counts, rows = np.zeros((len(pool), len(price))), np.arange(len(pool))
        counts[rows, first] = self.n1[pool, first, 0, split]
        counts[rows, second] += self.n2[pool, first, second, split]
        columns = Columns.of(pool, counts, price, limited)
        kept = np.arange(len(pool))
        for extra in _price_rises(len(limited)):
            left = columns.at(kept, with_counts=False)
            kept = kept[~left.dominated(left.cheapest(extra * price[limited]))]
        return columns.at(kept)


@dataclass(frozen=True, slots=True)
class Columns:
    """N columns, pool by pool: pool int64[N], start int64[P] of each pool's first, counts float64[N, O], use float64[N, L]
    of the options under quota, plain float64[N] cost without multipliers.
    """

    pool: Ints
    start: Ints
    counts: Floats
    use: Floats
    plain: Floats

    @classmethod
    def of(cls, pool: Ints, counts: Floats, price: Floats, limited: Ints) -> Self:
        """From counts of pools in order."""
        start = np.searchsorted(pool, np.arange(int(pool[-1]) + 1))
        return cls(pool, start, counts, np.ascontiguousarray(counts[:, limited]), counts @ price)

    def cost(self, extra: Floats) -> Floats:
        """float64[N] with multipliers float64[L] on top of the prices."""
        return np.asarray(self.plain + self.use @ extra)

    def cheapest(self, extra: Floats) -> Ints:
        """int64[P]: each pool's first cheapest column."""
        cost = self.cost(extra)
        found = np.flatnonzero(cost == np.minimum.reduceat(cost, self.start)[self.pool])
        chosen = np.zeros(len(self.start), np.int64)
        chosen[self.pool[found[::-1]]] = found[::-1]
        return chosen

    def dominated(self, chosen: Ints) -> Bools:
        """bool[N]: the columns that those chosen, one of each pool, beat or equal in cost and in every use."""
        other = chosen[self.pool]
        beaten = self.plain[other] <= self.plain
        for use in self.use.T:
            beaten &= use[other] <= use
        beaten[chosen] = False
        return beaten

    def nearest(self, extra: Floats, num_kept: int) -> Ints:
        """int64[P, num_kept]: each pool's cheapest columns at these multipliers, cheapest first; the last one repeated where
        a pool has fewer.
        """
        order = np.lexsort((self.cost(extra), self.pool))
        size = np.diff(self.start, append=len(self.pool))
        return np.asarray(order[self.start[:, None] + np.minimum(np.arange(num_kept), size[:, None] - 1)])

    def at(self, rows: Ints, with_counts: bool = True) -> Columns:
        """Only these columns int64[M], rising; some of each pool."""
        pool = self.pool[rows]
        start = np.searchsorted(pool, np.arange(len(self.start)))
        counts = self.counts[rows] if with_counts else self.counts[:0]
        return Columns(pool, start, counts, self.use[rows], self.plain[rows])


def _price_rises(num_limited: int) -> Floats:
    """float64[M, L] in shares of the price: the columns cheapest there beat most others."""
    together = np.array([100.0, 0.0, 0.5, 2.0])[:, None] * np.ones(num_limited)
    alone = np.concatenate([share * np.eye(num_limited) for share in (100.0, 1.0)])
    return together if num_limited == 1 else np.concatenate([together, alone])


def enumerate_candidates(problem: FleetProblem, split_shares: bool) -> Candidates:
    """Every pair of options: the first carries the bulk, 1 to 5 replicas fewer than it would need alone, the second the
    rest; with `split_shares` also sixths of the bulk fewer.

    Where both are the same option, that option alone.
    """
    runs = problem.capacity > 0
    capacity = np.where(runs, problem.capacity, 1.0)
    spare = np.where(problem.degraded > 0, problem.degraded, -np.inf)[:, None]  # no N+1 where nothing must survive
    demand, minimum = problem.demand[:, None], problem.minimum[:, None]
    alone = np.maximum(np.ceil(np.maximum(demand, spare + capacity) / capacity - 1e-9), minimum)
    step = np.arange(1.0, _NEAR + (_SHARES if split_shares else 1))
    fewer = np.where(step <= _NEAR, step, np.maximum(step, np.ceil(alone[:, :, None] * ((step - _NEAR) / _SHARES))))
    n1 = alone[:, :, None] - fewer  # [P, O, S]
    first_runs = (n1 > 0) & runs[:, :, None]
    # With both in use the larger may be the one that fails.
    need = np.maximum(demand[:, :, None], spare[:, :, None] + np.maximum(capacity[:, :, None], capacity[:, None]))
    n2 = need[:, :, :, None] - (capacity[:, :, None] * n1)[:, :, None]
    n2 /= capacity[:, None, :, None]
    n2 -= 1e-9
    np.ceil(n2, out=n2)
    np.maximum(n2, (minimum[:, :, None] - n1)[:, :, None], out=n2)
    never = (n2 <= 0) | ~first_runs[:, :, None] | ~runs[:, None, :, None]
    n2[never] = _NEVER
    same = np.arange(len(problem.price_usd_per_hour))
    n2[:, same, same] = _NEVER
    # n1 of the first split is shared with pairs of two, so that one option alone is written as the rest of its bulk.
    n2[:, same, same, 0] = np.where(runs, alone - np.where(first_runs[:, :, 0], n1[:, :, 0], 0.0), _NEVER)
    n2[~runs.any(1), 0, 0, 0] = 0.0  # a pool that wants nothing and could have nothing
    return Candidates(np.where(first_runs, n1, 0.0)[:, :, None], n2)
