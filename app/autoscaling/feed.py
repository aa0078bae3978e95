"""From what Serve knows to what the policy reads: `snapshot` takes references on the controller's thread, `Feed.read` does
the arithmetic on the planner's.

Demand comes from the replicas' own counters (app.replica, `record_autoscaling_stats`), pushed to the controller every
metrics_interval_s: how many sentences were offered to a replica since it started, refused ones included. Counters are
read with their time stamps, so a late report is a rate and not a burst, and a gap heals by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from app.cost.guards import Limits
from app.cost.replay import Observation
from app.cost.traces import Floats

OFFERED = "offered_sentences_total"
UPTIME = "uptime_s"
WAITING = "waiting_sentences"


class TimedValue(Protocol):
    """A point of a series that Serve keeps: time stamp of the replica's clock (epoch seconds) and value."""

    timestamp: float
    value: float


Series = Mapping[str, Mapping[Any, Sequence[TimedValue]]]  # metric name -> replica -> points, oldest first


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """What Serve knew of one pool at `taken_at_s` (epoch): running replicas, target and limits, requests that wait for a
    replica, and the series that the replicas reported.
    """

    taken_at_s: float
    running: tuple[Any, ...]
    target: int
    minimum: int
    maximum: int
    queued: float
    series: Series


@dataclass(frozen=True, slots=True)
class Reading:
    """All that one decision depends on; capacity float64[P]: of a replica, requests per second of the policy's clock."""

    seen: Observation
    limits: Limits
    capacity: Floats


def snapshot(context: Any) -> PoolSnapshot:
    """Of a ray.serve AutoscalingContext; cheap: Serve replaces the series at every report and never changes them."""
    return PoolSnapshot(
        taken_at_s=float(context.current_time),
        running=tuple(context.running_replicas),
        target=int(context.target_num_replicas),
        minimum=int(context.capacity_adjusted_min_replicas),
        maximum=int(context.capacity_adjusted_max_replicas),
        queued=float(context.total_queued_requests or 0.0),
        series=context.raw_metrics or {},
    )


class Feed:
    """Turns snapshots into readings for the pools `names`, in this order. period_s: real seconds of a slot."""

    def __init__(self, names: Iterable[str], period_s: float, stale_after_s: float) -> None:
        self._names = tuple(names)
        self._period_s = period_s
        self._stale_after_s = stale_after_s
        self._first_seen: dict[Any, float] = {}

    def read(self, pools: Mapping[str, PoolSnapshot], time_s: float, capacity: Floats) -> Reading:
        """The reading at `time_s` of the policy's clock. A pool that is not deployed is unknown and has no replicas."""
        rows = [self._pool(pools.get(name)) for name in self._names]
        offered, backlog, ready, pending, minimum, maximum, known = (np.array(column) for column in zip(*rows, strict=True))
        seen = Observation(time_s, offered, np.zeros(len(rows)), backlog.astype(np.float64), ready, pending)
        running = {replica for pool in pools.values() for replica in pool.running}
        self._first_seen = {replica: since for replica, since in self._first_seen.items() if replica in running}
        return Reading(seen, Limits(minimum, maximum, known), capacity)

    def _pool(self, pool: PoolSnapshot | None) -> tuple[int, float, int, int, int, int, bool]:
        if pool is None:
            return 0, 0.0, 0, 0, 0, 0, False
        ready = min(len(pool.running), pool.target)
        counts = [self._offered(pool, replica) for replica in pool.running]
        reported = [count for count in counts if count is not None]
        ages = [pool.taken_at_s - self._first_seen.setdefault(replica, pool.taken_at_s) for replica in pool.running]
        # A replica just started may be without a report for a while.
        overdue = any(count is None and age > self._stale_after_s for count, age in zip(counts, ages, strict=True))
        empty = not pool.running and pool.target == 0
        known = empty or (bool(reported) and not overdue)
        waiting = sum(self._newest(pool, WAITING, replica) or 0.0 for replica in pool.running)
        backlog = round(waiting + pool.queued, 3) if known else 0.0
        offered = round(sum(reported)) if known else 0
        return offered, backlog, ready, pool.target - ready, pool.minimum, pool.maximum, known

    def _newest(self, pool: PoolSnapshot, metric: str, replica: Any) -> float | None:
        points = pool.series.get(metric, {}).get(replica)
        if not points or pool.taken_at_s - points[-1].timestamp > self._stale_after_s:
            return None
        return float(points[-1].value)

    def _offered(self, pool: PoolSnapshot, replica: Any) -> float | None:
        """Sentences offered to a replica in one slot, at its newest rate; None without a fresh report."""
        newest, uptime_s = self._newest(pool, OFFERED, replica), self._newest(pool, UPTIME, replica)
        if newest is None or uptime_s is None or not (np.isfinite(newest) and np.isfinite(uptime_s)):
            return None
        if uptime_s <= self._period_s:  # all it was ever offered
            return newest
        points = pool.series[OFFERED][replica]
        latest_s = points[-1].timestamp
        before = next((p for p in reversed(points) if p.timestamp <= latest_s - self._period_s), points[0])
        span_s = latest_s - before.timestamp
        if span_s <= 0:  # one point only: the mean since it started
            return newest * self._period_s / uptime_s
        return max(newest - float(before.value), 0.0) * self._period_s / span_s
