"""A pretended Serve: real AutoscalingContext objects over scripted replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve._private.common import DeploymentID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from app.autoscaling.feed import OFFERED, UPTIME, WAITING

METRICS_INTERVAL_S = 0.05
LOOK_BACK_S = 1.0


class FakePool:
    """A pool whose replicas share `rate_per_s` sentences a second from `now_s` on; `report` off: no new points."""

    def __init__(self, name: str, now_s: float, *, running: int = 1, target: int = 1, minimum: int = 1, maximum: int = 20):
        self.id = DeploymentID(name=name, app_name="app")
        self.target, self.minimum, self.maximum = target, minimum, maximum
        self.rate_per_s, self.waiting, self.queued, self.report = 0.0, 0.0, 0.0, True
        self.started: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.points: dict[str, list[tuple[float, float]]] = {}
        self.now_s = now_s
        self.numbers = 0
        self.set_running(running)

    def set_running(self, count: int) -> None:
        """Start or stop replicas, the newest first."""
        while len(self.started) > count:
            gone = list(self.started)[-1]
            del self.started[gone], self.counts[gone], self.points[gone]
        while len(self.started) < count:
            self.numbers += 1
            name = f"{self.id.name}#{self.numbers}"
            self.started[name], self.counts[name], self.points[name] = self.now_s, 0.0, []

    def advance(self, now_s: float) -> None:
        """Let time pass; replicas report once every METRICS_INTERVAL_S."""
        while self.now_s + METRICS_INTERVAL_S <= now_s:
            self.now_s += METRICS_INTERVAL_S
            for name in self.started:
                self.counts[name] += self.rate_per_s * METRICS_INTERVAL_S / len(self.started)
                if self.report:
                    self.points[name].append((self.now_s, self.counts[name]))
        for name, points in self.points.items():
            self.points[name] = [point for point in points if point[0] >= self.now_s - LOOK_BACK_S]

    def series(self) -> Mapping[str, Any]:
        def stamped(values: Any) -> dict[str, list[TimeStampedValue]]:
            return {
                name: [TimeStampedValue(at_s, values(name, at_s, count)) for at_s, count in points]
                for name, points in self.points.items()
                if points
            }

        return {
            OFFERED: stamped(lambda name, at_s, count: count),
            UPTIME: stamped(lambda name, at_s, count: at_s - self.started[name]),
            WAITING: stamped(lambda name, at_s, count: self.waiting),
        }

    def context(self, now_s: float) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=self.id,
            deployment_name=self.id.name,
            app_name=self.id.app_name,
            current_num_replicas=len(self.started),
            target_num_replicas=self.target,
            running_replicas=list(self.started),  # type: ignore[arg-type]  # any hashable does
            total_num_requests=lambda: self.queued,
            total_queued_requests=lambda: self.queued,
            aggregated_metrics=None,
            raw_metrics=self.series,  # type: ignore[arg-type]
            capacity_adjusted_min_replicas=self.minimum,
            capacity_adjusted_max_replicas=self.maximum,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=AutoscalingConfig(
                min_replicas=self.minimum,
                max_replicas=max(self.maximum, 1),
                upscale_delay_s=0,
                downscale_delay_s=0,
            ),
        )
