"""Where plans are seen: metrics of the controller's process, and Ray's key-value store for `GET /v1/status`.

The store is part of the cluster (its head, or Redis behind it): the ingress reads it on any node, and no process more runs.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from app.autoscaling.planner import PoolPlan
from app.metric_recorders import AutoscalingMetrics

log = logging.getLogger("ray.serve")

_NAMESPACE = "babelephant"


def _key(application: str) -> str:
    return f"autoscaling:{application}"


class Publisher:
    """Publishes the plans of one application. `broken`: why there will be none."""

    def __init__(self) -> None:
        self.application = ""
        self.broken: str | None = None
        self._metrics: AutoscalingMetrics | None = None

    def publish(self, plans: Mapping[str, PoolPlan]) -> None:
        """Show a plan; called in the planner's thread, waits for the store. A store that fails is logged, not raised."""
        if self._metrics is None:
            self._metrics = AutoscalingMetrics()
        for name, plan in plans.items():
            self._metrics.decided(name, plan.current, plan.target, plan.pending, plan.forecast_per_s, plan.reason)
        self._put({"pools": {name: asdict(plan) for name, plan in plans.items()}})

    def publish_broken(self) -> None:
        """Show once why nothing is planned; does not wait."""
        if self.broken is not None:
            threading.Thread(target=self._put, args=({"broken": self.broken},), daemon=True).start()
            self.broken = None

    def _put(self, value: dict[str, Any]) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        try:
            _internal_kv_put(_key(self.application), json.dumps(value), overwrite=True, namespace=_NAMESPACE)
        except Exception:
            log.exception("autoscaling: the plan could not be stored for /v1/status")


def read_plans(application: str) -> dict[str, PoolPlan]:
    """The latest plans of an application, by pool; none when it has no such policy. Waits for the store.

    Raises RuntimeError with the policy's own message when its settings are wrong.
    """
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():  # type: ignore[no-untyped-call]
        return {}
    stored: Any = _internal_kv_get(_key(application), namespace=_NAMESPACE)
    if stored is None:
        return {}
    value = json.loads(stored)
    if "broken" in value:
        raise RuntimeError(value["broken"])
    return {name: PoolPlan(**plan) for name, plan in value["pools"].items()}
