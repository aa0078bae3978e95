"""The judge: what a run cost, what share was answered in time, and what a plan that knew everything would have cost.

One pool, time in whole seconds, requests as fluid in order of arrival. A request that arrives in second t has waited at
most one second when it is served in t or t + 1. Capacity of a replica: `capacity_per_s` requests in every second.

Clairvoyant (`clairvoyant_levels`): the fewest replicas in each interval so that nothing waits longer than that, then each
level kept on through gaps no longer than the start-up, and start-up seconds paid for every start. Given the needed
counts, that second step is exactly optimal: cost splits over levels, and a level's gap costs the smaller of its length
and one start-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from app.cost.traces import Floats, Ints

Queue = Literal["fifo", "bounded"]
_TOLERANCE = 1e-6  # requests; cumulated counts of 1e9 carry errors of 1e-7 in float64


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """Rules of one replay; all times are whole seconds.

    queue: "fifo" keeps all work until it is served; "bounded" drops what has waited `max_wait_s` (the product refuses
    late work).
    """

    capacity_per_s: float
    startup_s: int = 300
    interval_s: int = 10
    minimum: int = 1
    queue: Queue = "fifo"

    def __post_init__(self) -> None:
        if not self.capacity_per_s > 0:
            raise ValueError(f"capacity_per_s is {self.capacity_per_s}; it must be positive")
        if self.interval_s < 1 or self.startup_s < 0 or self.minimum < 0:
            raise ValueError("interval_s must be at least 1, startup_s and minimum at least 0")
        if self.queue not in ("fifo", "bounded"):
            raise ValueError(f"queue is {self.queue!r}; choose 'fifo' or 'bounded'")


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """A plan made with full knowledge. levels int64[K] replicas on per interval; replica_seconds with start-ups paid."""

    levels: Ints
    num_starts: int
    replica_seconds: float
    num_missed: float


def needed_replicas(arrivals: Ints, spec: JudgeSpec) -> Ints:
    """Fewest replicas in each interval with no wait over 1 s: int64[K] from arrivals int64[K * interval_s].

    Interval by interval: the smallest count that serves, by the end of each second u in it, all that arrived up to u - 1,
    starting from the queue that the previous intervals' counts left.
    """
    width, capacity = spec.interval_s, spec.capacity_per_s
    blocks = arrivals.reshape(-1, width).astype(np.float64)
    inside = np.concatenate([np.zeros((len(blocks), 1)), np.cumsum(blocks, 1)], 1)  # [K, width + 1], A within the interval
    spans = np.arange(1, width)
    # Busy from second j on (queue empty at j): all of A(u-1) - A(j) by u, for 0 < j < u.
    busy = np.zeros(len(blocks))
    for length in spans:
        gain = inside[:, length:width] - inside[:, : width - length]
        busy = np.maximum(busy, gain[:, 1:].max(1, initial=0.0) / (length + 1))
    # Busy from the start with queue q: (q + A(u-1)) / u for u = 1..width.
    due, seconds = inside[:, :width], np.arange(1, width + 1)
    least = np.maximum(np.ceil(busy / capacity - _TOLERANCE), spec.minimum)
    counts = np.empty(len(blocks), np.int64)
    queue = 0.0
    for index, block in enumerate(blocks):
        count = int(max(least[index], np.ceil(((queue + due[index]) / seconds).max() / capacity - _TOLERANCE)))
        counts[index] = count
        queue = _queue_after(block, queue, count * capacity)
    return counts


def _queue_after(block: Floats, queue: float, capacity_per_s: float) -> float:
    for arrived in block.tolist():
        queue = max(0.0, queue + arrived - capacity_per_s)
    return queue


def keep_through_gaps(needed: Ints, spec: JudgeSpec) -> tuple[Ints, int]:
    """Levels int64[K] >= needed, and the number of starts; level k stays on through gaps of at most the start-up.

    What is on in the first interval is there free of a start-up, as it is for every policy.
    """
    levels = np.zeros(len(needed), np.int64)
    num_starts = 0
    for level in range(1, int(needed.max(initial=0)) + 1):
        # Prepended "on": being there since the start is free, so a first gap is bridged like any other.
        steps = np.diff(np.concatenate([[1], (needed >= level).astype(np.int64), [0]]))
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        bridged = (starts - ends[: len(starts)]) * spec.interval_s <= spec.startup_s
        steps[starts[bridged]] = 0
        steps[ends[: len(starts)][bridged]] = 0
        levels += 1 + np.cumsum(steps)[:-1]
        num_starts += len(starts) - int(bridged.sum())
    return levels, num_starts


def clairvoyant_levels(arrivals: Ints, spec: JudgeSpec) -> Clairvoyant:
    """The plan without a miss; arrivals int64[seconds], a whole number of intervals."""
    levels, num_starts = keep_through_gaps(needed_replicas(arrivals, spec), spec)
    return Clairvoyant(levels, num_starts, float(levels.sum() * spec.interval_s + num_starts * spec.startup_s), 0.0)


def fluid_replica_seconds(arrivals: Ints, spec: JudgeSpec) -> float:
    """Replica-seconds of service in the arrivals themselves: no idling, no rounding, no start-up."""
    return float(arrivals.sum() / spec.capacity_per_s)


def late_fifo(arrivals: Floats, capacity: Floats, queue: float = 0.0) -> tuple[Floats, Floats]:
    """(late float64[T], queue float64[T]) of an unbounded FIFO: requests of each second that wait over 1 s, and work left
    at its end.

    arrivals and capacity float64[T] per second; `queue` is there before second 0 and already counted. The capacity after
    the last second is taken to stay what it was.
    """
    offered = queue + np.cumsum(arrivals)
    supply = np.cumsum(capacity)
    # Lindley's recursion unrolled: served(t) = min over s <= t of offered(s) + supply(t) - supply(s), and supply(t) itself.
    gap = np.minimum(np.minimum.accumulate(offered - supply), 0.0)
    served = supply + gap
    after = offered - served
    next_served = np.concatenate([served[1:], [served[-1] + min(after[-1], capacity[-1])]])
    late = np.clip(offered - next_served, 0.0, arrivals)
    return np.where(late > _TOLERANCE, late, 0.0), after


def clairvoyant_with_misses(arrivals: Ints, spec: JudgeSpec, max_miss_share: float, num_rounds: int = 14) -> Clairvoyant:
    """A plan that knows everything and may miss a share of requests, refusing them at once: the Lagrangian optimum of a
    relaxation.

    Misses of an interval are taken as what a bounded queue, empty at its start, refuses at that count; priced at one
    multiplier the problem splits over levels, and each is a two-state shortest path (on or off, a start costs the
    start-up). The cheapest priced plan whose misses, counted with the queue carried on throughout, stay within the share
    is returned: bisection on the price.
    """
    budget = max_miss_share * float(arrivals.sum())
    low, high = 0.0, 4.0 * max(spec.startup_s, spec.interval_s) / spec.capacity_per_s
    saved = _misses_saved(arrivals, spec)
    best = _priced_plan(arrivals, saved, spec, high)
    for _ in range(num_rounds):
        price = 0.5 * (low + high)
        plan = _priced_plan(arrivals, saved, spec, price)
        if plan.num_missed <= budget:
            high = price
            best = plan if plan.replica_seconds < best.replica_seconds or best.num_missed > budget else best
        else:
            low = price
    return best


def _misses_saved(arrivals: Ints, spec: JudgeSpec) -> Floats:
    """float64[L, K]: requests that level l (from 1) saves in each interval."""
    blocks = arrivals.reshape(-1, spec.interval_s)
    top = int(np.ceil(blocks.max(initial=0) / spec.capacity_per_s))
    missed = np.array([_refused(blocks, np.full(len(blocks), level * spec.capacity_per_s)) for level in range(top + 1)])
    return -np.diff(missed, axis=0)


def _refused(blocks: Ints, capacity: Floats) -> Floats:
    """float64[K]: requests of blocks int64[K, S] refused after waiting a second; each block starts with an empty queue.

    What is left at a block's end counts as refused: the next block's capacity is not promised to it.
    """
    backlog, refused = np.zeros(len(blocks)), np.zeros(len(blocks))
    for arrived in blocks.T:
        left = backlog - capacity
        refused += np.maximum(left, 0.0)
        backlog = np.maximum(arrived + np.minimum(left, 0.0), 0.0)
    return refused + backlog


def _priced_plan(arrivals: Ints, saved: Floats, spec: JudgeSpec, price: float) -> Clairvoyant:
    gain = (price * saved - spec.interval_s).T  # [K, L]
    gain[:, : spec.minimum] = np.inf
    num_intervals, num_levels = gain.shape
    came_on = np.zeros((num_intervals, num_levels), bool)  # best predecessor of "on" is "on"
    stayed_off = np.zeros((num_intervals, num_levels), bool)
    off, on = np.zeros(num_levels), np.zeros(num_levels)  # before the first interval both states are free
    finite = np.where(np.isfinite(gain), gain, 1e9)
    for index in range(num_intervals):
        started = off - (spec.startup_s if index else 0)
        came_on[index], stayed_off[index] = on >= started, off >= on
        off, on = np.maximum(off, on), np.maximum(on, started) + finite[index]
    states = np.zeros((num_intervals, num_levels), bool)
    state = on > off
    for index in range(num_intervals - 1, -1, -1):
        states[index] = state
        state = np.where(state, came_on[index], ~stayed_off[index])
    starts = int((states[1:] & ~states[:-1]).sum())
    levels = np.maximum(states.sum(1), spec.minimum).astype(np.int64)
    missed = _refused_in_a_row(arrivals, np.repeat(levels * spec.capacity_per_s, spec.interval_s))
    return Clairvoyant(levels, starts, float(levels.sum() * spec.interval_s + starts * spec.startup_s), missed)


def _refused_in_a_row(arrivals: Ints, capacity: Floats) -> float:
    """Requests a bounded queue refuses over arrivals [T] at capacity [T] per second, the queue carried on throughout."""
    refused, backlog = 0.0, 0.0
    for arrived, served in zip(arrivals.tolist(), capacity.tolist(), strict=True):
        left = backlog - served
        if left > 0:
            refused += left
            left = 0.0
        backlog = max(arrived + left, 0.0)
    return refused + max(backlog - float(capacity[-1]), 0.0)
