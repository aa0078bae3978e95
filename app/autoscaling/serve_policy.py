"""What the Serve YAML names: `autoscaling_policy: {policy_function: app.autoscaling.serve_policy:FleetAutoscaler}`.

Runs inside Serve's controller, about ten times a second, for all deployments of one application at once. An exception
here would stop every application's updates, and a class that cannot be made is dropped without a word while Serve's own
rule takes over: so neither is let out, and counts stay as they are instead.

Serve pickles this module's class by value: what it uses lives in other modules.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from typing import Any

from app.autoscaling import feed, publish
from app.autoscaling.capacity import check_files
from app.autoscaling.planner import FleetPlanner
from app.autoscaling.settings import AutoscalingSettings

log = logging.getLogger("ray.serve")

_MOST_BETWEEN_SNAPSHOTS_S = 1.0
_COMPLAIN_EVERY_S = 30.0


class FleetAutoscaler:
    """An application-level policy. Keyword arguments as in app.autoscaling.settings.AutoscalingSettings."""

    def __init__(self, **settings: Any) -> None:
        self._planner: FleetPlanner | None = None
        self._snapshot_every_s = _MOST_BETWEEN_SNAPSHOTS_S
        self._snapshot_at_s = 0.0
        self._complained_at_s = 0.0
        self._publisher = publish.Publisher()
        try:
            checked = AutoscalingSettings.model_validate(settings)
            check_files(checked)
        except (ValueError, OSError) as error:  # pydantic's and our own are ValueErrors
            log.error("autoscaling is off, replica counts stay as they are: policy_kwargs are wrong: %s", error)
            self._publisher.broken = f"policy_kwargs are wrong: {error}"
            return
        self._snapshot_every_s = min(_MOST_BETWEEN_SNAPSHOTS_S, checked.period_s / 2)
        self._planner = FleetPlanner(checked, self._publisher.publish)
        weakref.finalize(self, self._planner.stop)  # Serve drops a policy by forgetting it

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Targets for every deployment that autoscales; those without a plan keep theirs."""
        targets = {key: context.target_num_replicas for key, context in contexts.items()}
        try:
            self._follow_plan(contexts, targets)
        except Exception:
            if time.monotonic() - self._complained_at_s > _COMPLAIN_EVERY_S:
                self._complained_at_s = time.monotonic()
                log.exception("autoscaling: replica counts stay as they are")
        return targets, {}

    def _follow_plan(self, contexts: Mapping[Any, Any], targets: dict[Any, int]) -> None:
        now_s = time.time()
        if now_s - self._snapshot_at_s >= self._snapshot_every_s:
            self._snapshot_at_s = now_s
            self._publisher.application = next((key.app_name for key in contexts), "")
            if self._planner is None:
                self._publisher.publish_broken()
            else:
                self._planner.offer({context.deployment_name: feed.snapshot(context) for context in contexts.values()})
        if self._planner is None:
            return
        planned = self._planner.targets(now_s)
        for key, context in contexts.items():
            if (target := planned.get(context.deployment_name)) is not None:
                if target == 0 and context.total_num_requests > 0:  # Serve has woken the pool since the decision
                    target = max(1, context.target_num_replicas)
                targets[key] = max(
                    context.capacity_adjusted_min_replicas, min(context.capacity_adjusted_max_replicas, target)
                )
