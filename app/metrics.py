"""Every metric of the service: name, kind, help, labels, buckets. Nothing else defines one.

They go through Ray's own exporter (`GET /metrics` relays it for all processes), which prefixes `ray_` and adds the labels
application, deployment and replica. Durations are in seconds; counters end in `_total`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.serve import metrics as serve_metrics

from engine.accounting import MemoryPlan
from engine.types import EngineStats, ExpertLoad, Translation, TranslationRequest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_PAIR = ("pool", "src_lang", "tgt_lang")
_LAYER = ("pool", "stage", "layer")  # an expert's own series would be thousands a replica
_FLUSH_S = 0.25  # Ray's exporter itself reports every 2 s or more
_REPEAT_S = 2.0
_EXPERTS_S = 5.0  # five series a sparse layer, some microseconds of the interpreter's lock each


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
# metric -> field of EngineStats that counts since the start of the engine
_ENGINE_COUNTS: Mapping[str, str] = {
    "encode_passes": "num_encode_passes",
    "decode_steps": "num_decode_steps",
    "decoded_rows": "num_decoded_rows",
    "retried": "num_retries",
}

AUTOSCALING_METRICS: Mapping[str, MetricSpec] = {
    "ready": _gauge("autoscaling_ready_replicas", "Replicas that serve, at the last decision", "pool"),
    "target": _gauge("autoscaling_target_replicas", "Replicas decided, those still starting included", "pool"),
    "pending": _gauge("autoscaling_pending_replicas", "Replicas decided that do not serve yet", "pool"),
    "forecast": _gauge("autoscaling_forecast_sentences", "Forecast of the coming peak, sentences per second", "pool"),
    "decisions": _counter("autoscaling_decisions", "Decisions by reason (app.cost.guards.REASONS)", "pool", "reason"),
}


class Soon:
    """Runs `action` a little later in a thread of its own, once for all requests until then. Any thread may ask."""

    def __init__(self, action: Callable[[], None], delay_s: float = _FLUSH_S) -> None:
        self._action = action
        self._delay_s = delay_s
        self._is_due = False

    def request(self) -> None:
        """Have it run."""
        if not self._is_due:
            self._is_due = True
            timer = threading.Timer(self._delay_s, self._run)
            timer.daemon = True
            timer.start()

    def _run(self) -> None:
        self._is_due = False  # first: what is asked for while it runs is for the next time
        self._action()


class _Counts:
    """Adds increments up and gives Ray the sums now and then: its own increments cost microseconds, several a sentence."""

    def __init__(self, specs: Mapping[str, MetricSpec], live: Mapping[str, Any]) -> None:
        self._specs = specs
        self._live = live
        self._sums: dict[tuple[str, ...], float] = {}  # by metric and values of its labels
        self._lock = threading.Lock()
        self._soon = Soon(self.flush)

    def add(self, metric: str, amount: float, *labels: str) -> None:
        """Count; labels in the order of the spec."""
        place = (metric, *labels)
        with self._lock:
            self._sums[place] = self._sums.get(place, 0) + amount
        self._soon.request()

    def flush(self) -> None:
        """Hand over what has been counted."""
        with self._lock:
            sums, self._sums = self._sums, {}
        for (metric, *labels), amount in sums.items():
            if amount:
                self._live[metric].inc(amount, tags=dict(zip(self._specs[metric].labels, labels, strict=True)))


class _Levels:
    """Gauges that are set again by `repeat`: Ray's exporter forgets what nobody has set for two of its reports."""

    def __init__(self, live: Mapping[str, Any]) -> None:
        self._live = live
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # by metric and its labels
        self._due_s = 0.0

    def set(self, metric: str, value: float, tags: Mapping[str, str]) -> None:
        """The level from now on."""
        self._values[metric, tuple(tags.items())] = value
        self._live[metric].set(value, tags=dict(tags))

    def repeat(self) -> None:
        """To be called every few seconds or more often."""
        if (now_s := time.monotonic()) >= self._due_s:
            self._due_s = now_s + _REPEAT_S
            for (metric, tags), value in list(self._values.items()):
                self._live[metric].set(value, tags=dict(tags))


class IngressMetrics:
    """What the ingress records."""

    def __init__(self) -> None:
        self._live = {key: spec.create() for key, spec in INGRESS_METRICS.items()}
        self._counts = _Counts(INGRESS_METRICS, self._live)
        self._levels = _Levels(self._live)
        self._open_calls: dict[tuple[str, str], int] = {}
        self._open_calls_soon = Soon(self._record_open_calls)

    def call_began(self, pool: str, way: str) -> None:
        """A call was sent. This and the next two: app.pools.CallWatcher, in the ingress's event loop."""
        self._open_calls[pool, way] = self._open_calls.get((pool, way), 0) + 1
        self._open_calls_soon.request()

    def call_ended(self, pool: str, way: str, result: str, seconds: float) -> None:
        """It was answered, or not."""
        self._open_calls[pool, way] -= 1
        self._open_calls_soon.request()
        self._counts.add("calls", 1, pool, way, result)
        self._live["call_seconds"].observe(seconds, tags={"pool": pool, "way": way})

    def linked(self, pool: str, num_replicas: int) -> None:
        """So many replicas take direct calls now."""
        self._levels.set("linked", num_replicas, {"pool": pool})

    def repeat_levels(self) -> None:
        """To be called every few seconds."""
        self._levels.repeat()

    def _record_open_calls(self) -> None:
        for (pool, way), count in list(self._open_calls.items()):
            self._levels.set("open_calls", count, {"pool": pool, "way": way})

    def answered(self, route: str, status: int, seconds: float, error_code: str | None) -> None:
        """One HTTP answer left."""
        self._counts.add("requests", 1, route, str(status))
        self._live["request_seconds"].observe(seconds, tags={"route": route})
        if error_code is not None:
            self._counts.add("errors", 1, error_code)

    def replica_lost(self, pool: str, reason: str) -> None:
        """A replica went away with a call; reason is the name of Ray's error."""
        self._counts.add("lost_calls", 1, pool, reason)

    def translated(self, pool: str, src_lang: str, tgt_lang: str, num_texts: int, num_characters: int) -> None:
        """One translate request succeeded."""
        self._live["texts"].observe(num_texts, tags={"pool": pool})
        self._counts.add("characters", num_characters, pool, src_lang, tgt_lang)


class PoolMetrics:
    """What a replica records."""

    def __init__(self, pool: str) -> None:
        self._name = pool
        self._pool = {"pool": pool}
        self._live = {key: spec.create() for key, spec in POOL_METRICS.items()}
        self._counts = _Counts(POOL_METRICS, self._live)
        self._levels = _Levels(self._live)
        self._counted = dict.fromkeys(_ENGINE_COUNTS, 0)
        self._expert_loads: dict[str, ExpertLoad] = {}  # what has been counted of each stage
        self._experts_due_s = 0.0
        self._paid_until_s = time.monotonic()

    def finished(self, request: TranslationRequest, translation: Translation) -> None:
        """One sentence left the engine."""
        pair = (self._name, request.src_lang, request.tgt_lang)
        self._counts.add("sentences", 1, self._name, translation.finish_reason.value)
        self._counts.add("source_tokens", translation.num_source_tokens, *pair)
        self._counts.add("target_tokens", translation.num_target_tokens, *pair)
        for key, seconds in (
            ("queue_seconds", translation.timings.queue_s),
            ("encode_seconds", translation.timings.encode_s),
            ("decode_seconds", translation.timings.decode_s),
        ):
            self._live[key].observe(seconds, tags=self._pool)

    def rejected(self, reason: str) -> None:
        """One call was refused; reason `busy` or the code of the RequestError."""
        self._counts.add("rejections", 1, self._name, reason)

    def connection_refused(self, reason: str) -> None:
        """A connection for direct calls was closed; reasons: app.call_server.CallServer."""
        self._counts.add("refused_connections", 1, self._name, reason)

    def cancelled(self, num_sentences: int) -> None:
        """A caller with this many sentences went away."""
        self._counts.add("cancelled", num_sentences, self._name)

    def level(self, stats: EngineStats, num_pending: int) -> None:
        """Counts right now, and what the engine did since the last call. To be called every few seconds at least."""
        self._levels.repeat()
        for key, value in (
            ("live_rows", stats.num_live_rows),
            ("max_rows", stats.max_rows),
            ("waiting", stats.num_waiting),
            ("pending", num_pending),
        ):
            self._live[key].set(value, tags=self._pool)
        for key, field in _ENGINE_COUNTS.items():
            count = getattr(stats, field)
            self._counts.add(key, count - self._counted[key], self._name)
            self._counted[key] = count
        if stats.expert_loads and time.monotonic() >= self._experts_due_s:
            self._experts_due_s = time.monotonic() + _EXPERTS_S
            for load in stats.expert_loads:
                self._experts(load)

    def _experts(self, load: ExpertLoad) -> None:
        """One stage's expert loads, as far as they are news."""
        last = self._expert_loads.get(load.stage)
        if last is not None and last.num_passes == load.num_passes:
            return
        self._expert_loads[load.stage] = load
        for i, layer in enumerate(load.layers):
            labels = (self._name, load.stage, str(layer))
            for key, now, before in (
                ("expert_passes", load.num_passes, last.num_passes if last else 0),
                ("expert_tokens", load.num_tokens[i], last.num_tokens[i] if last else 0),
                ("active_experts", load.num_active[i], last.num_active[i] if last else 0),
            ):
                self._counts.add(key, now - before, *labels)
            for key, value in (("expert_skew", load.skew[i]), ("busiest_expert", load.busiest_share[i])):
                self._levels.set(key, value, dict(zip(_LAYER, labels, strict=True)))

    def memory(self, plan: MemoryPlan) -> None:
        """Bytes this replica holds."""
        for part, size in (
            ("experts", plan.experts_bytes),
            ("rest", plan.rest_bytes),
            ("layout_copies", plan.layout_copies_bytes),
            ("kv_cache", plan.kv_cache_bytes),
            ("workspace", plan.workspace_bytes),
            ("driver", plan.driver_bytes),
        ):
            self._levels.set("memory", size, {**self._pool, "part": part})

    def paid(self, usd_per_hour: float | None) -> None:
        """Time passed since the last call, at this price of one replica; None: it has none."""
        now = time.monotonic()
        if usd_per_hour:
            self._live["cost"].inc((now - self._paid_until_s) * usd_per_hour / 3600, tags=self._pool)
        self._paid_until_s = now


class AutoscalingMetrics:
    """What the autoscaling policy records, in Serve's controller."""

    def __init__(self) -> None:
        self._live = {key: spec.create() for key, spec in AUTOSCALING_METRICS.items()}

    def decided(self, pool: str, num_ready: int, target: int, num_pending: int, forecast_per_s: float, reason: str) -> None:
        """One pool's part of a decision."""
        tags = {"pool": pool}
        for key, value in (("ready", num_ready), ("target", target), ("pending", num_pending), ("forecast", forecast_per_s)):
            self._live[key].set(value, tags=tags)
        self._live["decisions"].inc(1, tags={**tags, "reason": reason})
