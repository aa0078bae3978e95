"""Metrics by the name that Prometheus sees, with kind, unit and labels: ours from app.metrics, Ray's that we show.

A test looks for Ray's in the installed Ray. Units: `s`, `ms`, `bytes`, `MiB`, `percent`, or the thing counted (`requests`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.metrics import AUTOSCALING_METRICS, INGRESS_METRICS, POOL_METRICS, MetricSpec

_SERVE = ("application", "deployment", "replica")  # Ray Serve adds them to ours
_GPU = ("ip", "SessionName", "GpuIndex", "GpuDeviceName")
_ABBREVIATED = {"seconds": "s"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric. `name` is without the `_bucket`, `_sum` and `_count` that a histogram has."""

    name: str
    kind: str
    unit: str
    labels: frozenset[str]


def unit_of(spec: MetricSpec) -> str:
    """The unit that a name of ours ends with: `queue_seconds` -> `s`, `source_tokens_total` -> `tokens`."""
    last_word = spec.name.removesuffix("_total").rsplit("_", 1)[-1]
    return _ABBREVIATED.get(last_word, last_word)


def _ours(spec: MetricSpec) -> Metric:
    return Metric(f"ray_{spec.name}", spec.kind, unit_of(spec), frozenset((*spec.labels, *_SERVE)))


def _rays(name: str, kind: str, unit: str, *labels: str) -> Metric:
    return Metric(f"ray_{name}", kind, unit, frozenset(labels))


_RAYS = (
    _rays("serve_deployment_replica_healthy", "gauge", "replicas", "application", "deployment"),
    _rays("serve_autoscaling_target_replicas", "gauge", "replicas", "application", "deployment"),
    _rays("serve_replica_processing_queries", "gauge", "requests", *_SERVE),
    _rays("serve_num_scheduling_tasks_in_backoff", "gauge", "requests", "application", "deployment"),
    _rays("serve_request_router_fulfillment_time_ms", "histogram", "ms", "application", "deployment"),
    _rays("serve_replica_startup_latency_ms", "histogram", "ms", "application", "deployment"),
    _rays("serve_health_check_failures_total", "counter", "failures", "application", "deployment"),
    _rays("node_gpus_utilization", "gauge", "percent", *_GPU),
    _rays("node_gram_used", "gauge", "MiB", *_GPU),  # Ray calls it bytes; what it sends is MiB
    _rays("node_gram_available", "gauge", "MiB", *_GPU),
    _rays("node_cpu_utilization", "gauge", "percent", "ip", "SessionName"),
    _rays("node_mem_used", "gauge", "bytes", "ip", "SessionName"),
)
_AUTOSCALING = tuple(  # from Serve's controller, which adds no labels of its own
    Metric(f"ray_{spec.name}", spec.kind, unit_of(spec), frozenset(spec.labels)) for spec in AUTOSCALING_METRICS.values()
)
_SERVED = tuple(_ours(spec) for spec in (*INGRESS_METRICS.values(), *POOL_METRICS.values()))
CATALOGUE: Mapping[str, Metric] = {metric.name: metric for metric in (*_SERVED, *_AUTOSCALING, *_RAYS)}
