"""Candidate plans of single pools ("columns"): one or two options each, all pools at once, in numpy.

Letters: P pools, O options, C candidates, K candidates kept per pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.cost.fleet import FleetProblem
from app.cost.traces import Floats, Ints

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

    @property
    def num_candidates(self) -> int:
        """C."""
        return int(np.prod(self.n2.shape[1:]))

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

    def best_of_pairs(self, cost: Floats, num_kept: int) -> Ints:
        """int64[P, K]: for each pool the cheapest candidate of each of its num_kept cheapest (first, second)."""
        splits = self.n2.shape[3]
        grouped = cost.reshape(len(cost), -1, splits)
        within = grouped.argmin(2)
        cheapest = np.take_along_axis(grouped, within[:, :, None], 2)[:, :, 0]
        pairs = np.argpartition(cheapest, min(num_kept, cheapest.shape[1]) - 1, axis=1)[:, :num_kept]
        return np.asarray(pairs * splits + np.take_along_axis(within, pairs, 1))

    def cheapest(self, cost: Floats, num_kept: int) -> Ints:
        """int64[P, K]: the num_kept cheapest candidates of each pool."""
        return np.asarray(np.argpartition(cost, min(num_kept, cost.shape[1]) - 1, axis=1)[:, :num_kept])


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
    return Candidates(np.where(first_runs, n1, 0.0)[:, :, None], n2)
