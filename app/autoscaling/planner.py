"""The thread that reads, decides, logs and publishes; Serve's controller leaves snapshots and takes the latest plan."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.autoscaling.capacity import ReplicaCapacity
from app.autoscaling.decision_log import DecisionLog
from app.autoscaling.feed import Feed, PoolSnapshot, Reading
from app.autoscaling.settings import AutoscalingSettings
from app.cost.guards import FleetDecision

log = logging.getLogger("ray.serve")

_PLAN_LASTS = 6.0  # decision periods after which a plan is too old to follow


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What was decided for one pool; rates in sentences per real second, decided_at_s in epoch seconds."""

    current: int
    target: int
    pending: int
    reason: str
    forecast_per_s: float
    offered_per_s: float
    backlog: float
    decided_at_s: float
    state: str


Publish = Callable[[Mapping[str, PoolPlan]], None]


class FleetPlanner:
    """Decides every `settings.period_s` seconds in a daemon thread, from the snapshot that `offer` left last.

    `publish` is called with every plan, in the thread. State of a pool's plan: `waiting` until its metrics arrived once,
    `warming_up` until enough was seen to remove replicas, then `deciding`.
    """

    def __init__(self, settings: AutoscalingSettings, publish: Publish) -> None:
        self._settings = settings
        self._publish = publish
        self._policy = settings.policy()
        self._feed = Feed(settings.pools, settings.period_s, settings.stale_after_s)
        self._snapshot: Mapping[str, PoolSnapshot] = {}
        self._plan: Mapping[str, PoolPlan] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscaling", daemon=True)
        self._thread.start()

    def offer(self, snapshot: Mapping[str, PoolSnapshot]) -> None:
        """Leave what Serve knows now; the planner reads the latest."""
        self._snapshot = snapshot

    def targets(self, now_s: float) -> dict[str, int]:
        """Replicas per pool by the latest plan; pools without a plan, or with one too old (the thread is stuck), are left
        out. now_s: epoch seconds.
        """
        oldest = now_s - _PLAN_LASTS * max(self._settings.period_s, 1.0)
        return {name: plan.target for name, plan in self._plan.items() if plan.decided_at_s > oldest}

    def stop(self) -> None:
        """End the thread soon; does not wait."""
        self._stop.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; True when it is gone."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        path = self._settings.log_path
        try:
            capacity = ReplicaCapacity(self._settings)
            if path is None:
                self._decide_until_stopped(capacity, None)
            else:
                with DecisionLog(path.expanduser(), self._settings) as decisions:
                    self._resume(capacity, decisions)
                    self._decide_until_stopped(capacity, decisions)
        except Exception:
            log.exception("autoscaling ended: replica counts stay as they are until the application is deployed again")

    def _resume(self, capacity: ReplicaCapacity, decisions: DecisionLog) -> None:
        started, count, last = time.monotonic(), 0, None
        for last in decisions.past(self._stop.is_set):
            self._policy.decide_on(last)
            count += 1
        if last is not None:
            capacity.resume(last.capacity)
            log.info("autoscaling: %d decisions of the past read in %.1f s", count, time.monotonic() - started)

    def _decide_until_stopped(self, capacity: ReplicaCapacity, decisions: DecisionLog | None) -> None:
        period_s = self._settings.period_s
        next_s = time.monotonic() + period_s
        while not self._stop.wait(max(next_s - time.monotonic(), 0.0)):
            next_s = max(next_s + period_s, time.monotonic())  # after a delay: at once, and no more than once
            try:
                self._decide(capacity, decisions)
            except Exception:
                log.exception("autoscaling: no decision this time, replica counts stay")

    def _decide(self, capacity: ReplicaCapacity, decisions: DecisionLog | None) -> None:
        pools = self._snapshot
        now_s = time.time()
        newest_s = max((pool.taken_at_s for pool in pools.values()), default=0.0)
        if now_s - newest_s > self._settings.stale_after_s:
            return  # the controller does not ask: nothing is known and nobody would listen
        time_s = now_s * self._settings.clock_scale
        capacity.observe(time_s, pools)
        reading = self._feed.read(pools, time_s, capacity.per_s)
        if not (self._policy.started or reading.limits.known.any()):
            return  # before the first metrics there is nothing to learn from
        decision = self._policy.decide_on(reading)
        if decisions is not None:
            decisions.append(reading, decision)
        self._plan = self._plans(reading, decision, now_s)
        self._publish(self._plan)

    def _plans(self, reading: Reading, decision: FleetDecision, now_s: float) -> dict[str, PoolPlan]:
        seen, clock_scale = reading.seen, self._settings.clock_scale
        states = self._policy.states()
        return {
            name: PoolPlan(
                current=int(seen.ready[index]),
                target=int(decision.target[index]),
                pending=max(int(decision.target[index] - seen.ready[index]), 0),
                reason=decision.reason[index],
                forecast_per_s=float(decision.forecast[index]) * clock_scale,
                offered_per_s=float(seen.offered[index]) / self._settings.period_s,
                backlog=float(seen.backlog[index]),
                decided_at_s=now_s,
                state=states[index],
            )
            for index, name in enumerate(self._settings.pools)
        }
