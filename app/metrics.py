"""Every metric of the service: name, kind, help, labels, buckets. Nothing else defines one; `metric_recorders` fills them.

They go through Ray's own exporter (`GET /metrics` relays it for all processes), which prefixes `ray_` and adds the labels
application, deployment and replica. Durations are in seconds; counters end in `_total`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.serve import metrics as serve_metrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_PAIR = ("pool", "src_lang", "tgt_lang")
_LAYER = ("pool", "stage", "layer")  # an expert's own series would be thousands a replica


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric as it is exported (without the `ray_` prefix)."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    def create(self) -> Any:
        """The live metric of this process."""
        labels: Any = self.labels  # Ray's annotation says one label
        if self.kind == "histogram":
            return serve_metrics.Histogram(self.name, self.help, boundaries=list(self.buckets), tag_keys=labels)
        kind = serve_metrics.Counter if self.kind == "counter" else serve_metrics.Gauge
        return kind(self.name, self.help, tag_keys=labels)


def _counter(name: str, help_text: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"babelephant_{name}_total", "counter", help_text, labels)


def _gauge(name: str, help_text: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"babelephant_{name}", "gauge", help_text, labels)


def _histogram(name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> MetricSpec:
    return MetricSpec(f"babelephant_{name}", "histogram", help_text, labels, buckets)


INGRESS_METRICS: Mapping[str, MetricSpec] = {
    "requests": _counter("http_requests", "HTTP requests answered", "route", "status"),
    "request_seconds": _histogram("http_request_seconds", "From request to last byte of the answer", _SECONDS, "route"),
    "errors": _counter("errors", "Error answers by error code", "code"),
    "texts": _histogram("request_texts", "Texts in one translate request", _TEXTS, "pool"),
    "lost_calls": _counter("lost_replica_calls", "Calls whose replica was lost; each is tried once more", "pool", "reason"),
    "characters": _counter("source_characters", "Characters of texts translated", *_PAIR),
    "calls": _counter(
        "replica_calls", "Calls of replicas by way (direct, or Serve's handle) and result", "pool", "way", "result"
    ),
    "call_seconds": _histogram(
        "replica_call_seconds", "From a call to its answer, seen by the ingress", _SECONDS, "pool", "way"
    ),
    "open_calls": _gauge("open_calls", "Calls of an ingress that are not answered yet", "pool", "way"),
    "linked": _gauge("linked_replicas", "Replicas that an ingress can call directly", "pool"),
}

POOL_METRICS: Mapping[str, MetricSpec] = {
    "sentences": _counter("sentences", "Sentences that left the engine, by reason", "pool", "finish_reason"),
    "source_tokens": _counter("source_tokens", "Source tokens of finished sentences", *_PAIR),
    "target_tokens": _counter("target_tokens", "Target tokens of finished sentences (best hypothesis)", *_PAIR),
    "queue_seconds": _histogram("queue_seconds", "Time one sentence waited in the engine's queue", _SECONDS, "pool"),
    "encode_seconds": _histogram("encode_seconds", "Time one sentence spent in its encoder pass", _SECONDS, "pool"),
    "decode_seconds": _histogram("decode_seconds", "Time one sentence spent in decode steps", _SECONDS, "pool"),
    "rejections": _counter("rejected_requests", "Calls refused, by reason", "pool", "reason"),
    "cancelled": _counter("cancelled_sentences", "Sentences whose caller went away", "pool"),
    "live_rows": _gauge("live_rows", "Beams being decoded", "pool"),
    "max_rows": _gauge("max_rows", "Most beams that can be decoded at once", "pool"),
    "waiting": _gauge("waiting_sentences", "Sentences in the engine's queue", "pool"),
    "pending": _gauge("pending_sentences", "Sentences accepted and not answered yet", "pool"),
    "encode_passes": _counter("encode_passes", "Encoder passes", "pool"),
    "decode_steps": _counter("decode_steps", "Decode steps", "pool"),
    "decoded_rows": _counter("decoded_rows", "Live beams of all decode steps: over decode steps, the mean batch", "pool"),
    "retried": _counter("retried_sentences", "Sentences that started over after a fault in work they shared", "pool"),
    "expert_passes": _counter(
        "sampled_expert_passes", "Passes whose expert loads were read: on a GPU one decode step of 17, else all", *_LAYER
    ),
    "expert_tokens": _counter("sampled_expert_tokens", "Pairs of token and expert in sampled passes", *_LAYER),
    "active_experts": _counter(
        "sampled_active_experts", "Experts with a token, of all sampled passes: over those, what a pass reads", *_LAYER
    ),
    "expert_skew": _gauge(
        "expert_load_skew_ratio", "Recent tokens of the busiest expert over those of the mean one; 1 is even", *_LAYER
    ),
    "busiest_expert": _gauge(
        "busiest_expert_share_ratio", "Share of recent (token, expert) pairs that go to the busiest expert", *_LAYER
    ),
    "refused_connections": _counter(
        "refused_connections", "Connections for direct calls that were closed, by reason", "pool", "reason"
    ),
    "memory": _gauge("memory_bytes", "Weights and caches of the replica, by part; from the model's shape", "pool", "part"),
    "cost": _counter(
        "cost_usd", "Price of the replica's time, where usd_per_hour of the pool's user_config says it", "pool"
    ),
}

AUTOSCALING_METRICS: Mapping[str, MetricSpec] = {
    "ready": _gauge("autoscaling_ready_replicas", "Replicas that serve, at the last decision", "pool"),
    "target": _gauge("autoscaling_target_replicas", "Replicas decided, those still starting included", "pool"),
    "pending": _gauge("autoscaling_pending_replicas", "Replicas decided that do not serve yet", "pool"),
    "forecast": _gauge("autoscaling_forecast_sentences", "Forecast of the coming peak, sentences per second", "pool"),
    "decisions": _counter("autoscaling_decisions", "Decisions by reason (app.cost.guards.REASONS)", "pool", "reason"),
}
