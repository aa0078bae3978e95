"""Fine adjustment of a plan under quotas: pools, one at a time, trade replicas for what the room left allows.

A pool's alternatives are its columns and what comes of giving up a few replicas of one option for another, so that
plans of three and more options come about.
"""

from __future__ import annotations

import numpy as np

from app.cost.fleet import FleetProblem
from app.cost.fleet_columns import Columns
from app.cost.traces import Floats, Ints

_STEPS = 6  # replicas given up one by one, then by sixths of what there is
_FEW = 3  # replicas given up after a room was filled
_NEARLY = 4  # lowest prices: how much dearer a filled room may be before its swaps


def exchange(problem: FleetProblem, columns: Columns, counts: Ints, pools: Ints, fine: Floats, num_passes: int = 2) -> Ints:
    """Counts int64[P, O], no dearer than those given when a replica over quota costs `fine` float64[O]; only `pools`
    change.
    """
    counts, price = counts.copy(), problem.price_usd_per_hour
    room = problem.quota - counts.sum(0)
    for _ in range(num_passes):
        moved = False
        for pool in pools.tolist():
            others = _alternatives(problem, columns, pool, counts[pool], room)
            over = np.maximum(others - (room + counts[pool]), 0.0)
            value = others @ price + over @ fine
            best = int(value.argmin())
            if value[best] < counts[pool] @ price + np.maximum(-room, 0.0) @ fine - 1e-9:
                room += counts[pool] - others[best]
                counts[pool], moved = others[best].astype(np.int64), True
        if not moved:
            break
    return counts


def _alternatives(problem: FleetProblem, columns: Columns, pool: int, own: Ints, room: Floats) -> Floats:
    """float64[N, O] plans of one pool that meet its demand, N+1 and minimum."""
    plain = columns.counts[columns.start[pool] : columns.start[pool + 1] if pool + 1 < len(columns.start) else None]
    bases = own.astype(np.float64)[None]
    fills = _fills(problem, pool, own, room)
    near = fills @ problem.price_usd_per_hour < own @ problem.price_usd_per_hour + _NEARLY * problem.price_usd_per_hour.min()
    swaps = [_swaps(problem, pool, bases, 2 * _STEPS - 1), _swaps(problem, pool, fills[near], _FEW)]
    return np.concatenate([plain, fills, *swaps])


def _swaps(problem: FleetProblem, pool: int, bases: Floats, num_steps: int) -> Floats:
    """float64[N, O]: plans float64[B, O] with some replicas of one option replaced by the fewest of another."""
    capacity, degraded = problem.capacity[pool], float(problem.degraded[pool])
    step = np.arange(1, num_steps + 1)
    numbers = np.where(step <= _STEPS, step, np.maximum(step, np.ceil(bases[:, :, None] * ((step - _STEPS) / _STEPS))))
    different = ~np.eye(len(capacity), dtype=bool) & (capacity > 0)
    base, given, which, taken = np.nonzero((numbers <= bases[:, :, None])[:, :, :, None] & different[:, None])
    number = numbers[base, given, which]
    plans, rows = bases[base], np.arange(len(base))
    plans[rows, given] -= number
    need = np.full(len(plans), float(problem.demand[pool]))
    if degraded > 0:
        largest = np.where(plans > 0, capacity, 0.0).max(1, initial=0.0)
        need = np.maximum(need, degraded + np.maximum(largest, capacity[taken]))
    added = np.maximum(np.ceil((need - plans @ capacity) / capacity[taken] - 1e-9), problem.minimum[pool] - plans.sum(1))
    plans[rows, taken] += np.maximum(added, 0.0)
    return plans


def _fills(problem: FleetProblem, pool: int, own: Ints, room: Floats) -> Floats:
    """float64[N, O]: `own` with all the room of one option under quota taken, and as many of another given up as that
    allows.
    """
    capacity, degraded = problem.capacity[pool], float(problem.degraded[pool])
    open_to = np.isfinite(room) & (room > 0) & (capacity > 0)
    taken, given = np.nonzero(open_to[:, None] & (own > 0) & ~np.eye(len(own), dtype=bool))
    plans = np.tile(own.astype(np.float64), (len(taken), 1))
    rows = np.arange(len(plans))
    plans[rows, taken] += room[taken]
    need = np.full(len(plans), float(problem.demand[pool]))
    if degraded > 0:
        need = np.maximum(need, degraded + np.where(plans > 0, capacity, 0.0).max(1, initial=0.0))
    spare = np.minimum((plans @ capacity - need) / capacity[given], plans.sum(1) - problem.minimum[pool])
    plans[rows, given] -= np.clip(np.floor(spare + 1e-9), 0.0, own[given])
    return plans
