"""Replay: a trace, a policy and a start-up time in; replica-seconds and misses out. Vectorised over pools, skipping idle
queues.

Slot k covers seconds [k * interval_s, (k + 1) * interval_s). At its start the policy sees what was measured in the slots
before and names a total per pool. More: replicas are ordered, billed from now, ready after `startup_s`. Fewer: pending
orders are cancelled, the newest first, then ready replicas are removed; both stop being billed now. The live autoscaler
feeds the same `Policy` object.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from app.cost.judge import JudgeSpec
from app.cost.traces import Floats, Ints

Counts = npt.NDArray[np.signedinteger[Any]]  # any width: 14 days of 200 pools in seconds are large


@dataclass(frozen=True, slots=True)
class Observation:
    """What a policy may know at `time_s` (seconds since an epoch it shares with its history); all arrays are [P] pools.

    offered and late: requests that arrived, and that were found late or refused, in the slot just ended; backlog:
    requests waiting; ready and pending: replicas. In the first slot nothing has been measured yet: `offered` is what the
    slot before would have shown.
    """

    time_s: float
    offered: Ints
    late: Floats
    backlog: Floats
    ready: Ints
    pending: Ints


class Policy(Protocol):
    """Decides replica totals; called once per slot with increasing times."""

    def decide(self, seen: Observation) -> Ints:
        """int64[P] replicas wanted per pool, pending ones included."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result per pool [P] and per slot [K, P].

    total, ready int64[K, P] replicas at the start of each slot (after the decision); slot_offered, slot_late float64[K,
    P] requests.
    """

    spec: JudgeSpec
    total: Ints
    ready: Ints
    slot_offered: Floats
    slot_late: Floats

    @property
    def replica_seconds(self) -> Floats:
        """float64[P]."""
        return np.asarray(self.total.sum(0) * float(self.spec.interval_s))

    @property
    def attainment(self) -> float:
        """Share of all offered requests answered within the SLO; 1 when nothing was offered."""
        offered = float(self.slot_offered.sum())
        return 1.0 - float(self.slot_late.sum()) / offered if offered else 1.0

    @property
    def pool_attainment(self) -> Floats:
        """float64[P]; 1 where nothing was offered."""
        offered, late = self.slot_offered.sum(0), self.slot_late.sum(0)
        return np.asarray(1.0 - np.divide(late, offered, out=np.zeros_like(late), where=offered > 0))


class Fleet:
    """Replicas of P pools under one start-up time: ready ones, and orders on their way, oldest first."""

    def __init__(self, ready: Ints, startup_s: int) -> None:
        self.ready = ready.astype(np.int64).copy()
        self.pending = np.zeros_like(self.ready)
        self.startup_s = startup_s
        self._orders: deque[tuple[int, Ints]] = deque()

    def scale_to(self, wanted: Ints, now_s: int) -> None:
        """Order, cancel or remove at once so that ready + pending equals `wanted`."""
        change = wanted - self.ready - self.pending
        if not change.any():
            return
        if (change > 0).any():
            order = np.maximum(change, 0)
            self._orders.append((now_s + self.startup_s, order))
            self.pending += order
        surplus = np.maximum(-change, 0)
        if surplus.any():
            for _, order in reversed(self._orders):
                cancelled = np.minimum(order, surplus)
                np.subtract(order, cancelled, out=order)
                self.pending -= cancelled
                surplus -= cancelled
            self.ready -= surplus

    def arrivals_within(self, start_s: int, end_s: int) -> list[tuple[int, Ints]]:
        """Orders that become ready in [start_s, end_s), moved to ready: (second, int64[P])."""
        arrived = []
        while self._orders and self._orders[0][0] < end_s:
            ready_s, order = self._orders.popleft()
            if order.any():
                arrived.append((max(ready_s, start_s), order))
                self.ready += order
                self.pending -= order
        return arrived


class PoolQueue:
    """Fluid queues of P pools in steps of one second; see app.cost.judge for what late means."""

    def __init__(self, num_pools: int, spec: JudgeSpec) -> None:
        self.spec = spec
        self.backlog = np.zeros(num_pools)
        self._newest = np.zeros(num_pools)  # requests of the last second, the part of the backlog that is not late yet

    def run(self, arrivals: Counts, capacity: Floats) -> Floats:
        """Serve one slot: arrivals int64[S, P], capacity float64[S, P] -> late requests found in it float64[P]."""
        late = np.zeros(len(self.backlog))
        busy = np.flatnonzero((self.backlog > 0) | (arrivals > capacity).any(0))
        if len(busy):
            step = self._fifo if self.spec.queue == "fifo" else self._bounded
            late[busy] = step(busy, arrivals[:, busy].astype(np.float64), capacity[:, busy])
        self._newest[:] = arrivals[-1]
        return late

    def _fifo(self, busy: Ints, arrivals: Floats, capacity: Floats) -> Floats:
        backlog, newest = self.backlog[busy], self._newest[busy]
        late = np.zeros(len(busy))
        for arrived, served in zip(arrivals, capacity, strict=True):
            left = backlog - served  # of the work there before this second
            late += np.minimum(np.maximum(left, 0.0), newest)
            backlog = np.maximum(left + arrived, 0.0)
            newest = arrived
        self.backlog[busy] = backlog
        return late

    def _bounded(self, busy: Ints, arrivals: Floats, capacity: Floats) -> Floats:
        backlog = self.backlog[busy]
        late = np.zeros(len(busy))
        for arrived, served in zip(arrivals, capacity, strict=True):
            left = backlog - served
            late += np.maximum(left, 0.0)
            backlog = np.maximum(arrived + np.minimum(left, 0.0), 0.0)
        self.backlog[busy] = backlog
        return late


def replay(arrivals: Counts, policy: Policy, spec: JudgeSpec, offered_before: Ints, start_s: int = 0) -> Outcome:
    """Run `policy` over arrivals int64[T, P] (T a whole number of slots), starting at `start_s` of the policy's clock.

    offered_before int64[P]: requests of the slot before the first. The first decision's replicas are there at once, free
    of start-up.
    """
    num_slots, rest = divmod(len(arrivals), spec.interval_s)
    if rest or not num_slots:
        raise ValueError(
            f"{len(arrivals)} seconds of arrivals are not a whole number of {spec.interval_s} s intervals; cut them"
        )
    num_pools = arrivals.shape[1]
    queue, fleet = PoolQueue(num_pools, spec), Fleet(np.zeros(num_pools, np.int64), startup_s=0)
    slots = arrivals.reshape(num_slots, spec.interval_s, num_pools)
    slot_offered = slots.sum(1)
    total, ready = np.empty((num_slots, num_pools), np.int64), np.empty((num_slots, num_pools), np.int64)
    slot_late = np.zeros((num_slots, num_pools))
    offered, late = offered_before, np.zeros(num_pools)
    for index in range(num_slots):
        now_s = index * spec.interval_s
        fleet.arrivals_within(now_s, now_s + 1)
        seen = Observation(
            float(start_s + now_s), offered, late, queue.backlog.copy(), fleet.ready.copy(), fleet.pending.copy()
        )
        fleet.scale_to(np.maximum(policy.decide(seen), spec.minimum), now_s)
        if index == 0:
            fleet.arrivals_within(now_s, now_s + 1)
            fleet.startup_s = spec.startup_s
        total[index], ready[index] = fleet.ready + fleet.pending, fleet.ready
        late = queue.run(slots[index], _capacity(fleet, now_s, spec))
        offered, slot_late[index] = slot_offered[index], late
    slot_late[-1] += _late_at_the_end(queue, fleet, spec)
    return Outcome(spec, total, ready, slot_offered.astype(np.float64), slot_late)


def _capacity(fleet: Fleet, now_s: int, spec: JudgeSpec) -> Floats:
    """float64[S, P] of one slot; orders may become ready inside it."""
    before = fleet.ready.copy()
    arrived = fleet.arrivals_within(now_s, now_s + spec.interval_s)
    capacity: Floats = np.tile(before * float(spec.capacity_per_s), (spec.interval_s, 1))
    for second, order in arrived:
        capacity[second - now_s :] += order * spec.capacity_per_s
    return capacity


def _late_at_the_end(queue: PoolQueue, fleet: Fleet, spec: JudgeSpec) -> Floats:
    """Requests of the last second that the next one would not serve."""
    return np.minimum(np.maximum(queue.backlog - fleet.ready * spec.capacity_per_s, 0.0), queue._newest)
