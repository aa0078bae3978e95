"""What each process records, in its own words: the ingress, a replica, the autoscaling policy."""

from __future__ import annotations

import time
from collections.abc import Mapping

from app.metric_export import Counts, Levels, Soon
from app.metrics import AUTOSCALING_METRICS, INGRESS_METRICS, POOL_METRICS
from engine.accounting import MemoryPlan
from engine.types import EngineStats, ExpertLoad, Translation, TranslationRequest

_EXPERTS_S = 5.0  # five series a sparse layer, some microseconds of the interpreter's lock each
# metric -> field of EngineStats that counts since the start of the engine
_ENGINE_COUNTS: Mapping[str, str] = {
    "encode_passes": "num_encode_passes",
    "decode_steps": "num_decode_steps",
    "decoded_rows": "num_decoded_rows",
    "retried": "num_retries",
}


class IngressMetrics:
    """What the ingress records."""

    def __init__(self) -> None:
        self._live = {key: spec.create() for key, spec in INGRESS_METRICS.items()}
        self._counts = Counts(INGRESS_METRICS, self._live)
        self._levels = Levels(self._live)
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
        self._counts = Counts(POOL_METRICS, self._live)
        self._levels = Levels(self._live)
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
                self._levels.set(key, value, dict(zip(POOL_METRICS[key].labels, labels, strict=True)))

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
