"""Serve's own rule for a pool that is called directly: so many replicas that each has `target_ongoing_requests` calls open.

Serve counts the calls of its handles, and direct calls are none. So every replica tells how many calls it holds, of both
kinds, with the numbers that Serve collects from it every metrics_interval_s, and this policy reads those. Bounds, delays,
factors and the look-back period of the pool's `autoscaling_config` apply as always; Serve adds them around a policy:

    autoscaling_config:
      policy: {policy_function: "app.autoscaling.open_calls:scale_by_open_calls"}
"""

from __future__ import annotations

from typing import Any

OPEN_CALLS = "open_calls"
POLICY_PATH = "app.autoscaling.open_calls:scale_by_open_calls"


def scale_by_open_calls(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas wanted, and no state; context: ray.serve AutoscalingContext.

    A replica that has not reported yet counts like the mean of those that have; when none has, the number stays.
    """
    replicas = list(context.running_replicas)
    reported = (context.aggregated_metrics or {}).get(OPEN_CALLS, {})
    known = [float(reported[replica]) for replica in replicas if replica in reported]
    if not known:
        return context.target_num_replicas, {}
    num_open = sum(known) / len(known) * len(replicas)
    waiting = float(context.total_queued_requests or 0.0)  # in Serve's handles, for a replica to appear
    return (num_open + waiting) / context.config.get_target_ongoing_requests(), {}
