"""The deployment that owns one Translator on its device. Only app.serve names it; torch loads inside `__init__`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from app.autoscaling.feed import OFFERED, UPTIME, WAITING
from app.autoscaling.open_calls import OPEN_CALLS
from app.autoscaling.pair_counts import PairCounter
from app.call_server import CallServer
from app.devices import require_device
from app.engine_thread import Engine, EngineDeadError, EngineFailedError, EngineThread, RefusedError
from app.jobs import Outcome
from app.metric_export import Soon
from app.metric_recorders import PoolMetrics
from app.pools import ReplicaStatus
from app.settings import PoolSettings, PoolTuning
from app.tracing import past_span, record_sentences, span
from app.wire import Busy, CallAddress, Failed, Refused, Translated, TranslateReply
from engine.accounting import plan_memory
from engine.config import EngineConfig, ModelConfig
from engine.types import EngineFullError, TranslationRequest

log = logging.getLogger("ray.serve")

_DRAIN_S = 30.0
_SWITCH_INTERVAL_S = 0.0005  # with Python's 5 ms the engine thread waits ten decode steps for another to let go
_EXIT_DELAY_S = 0.5  # long enough for the failed calls to be answered


def exit_soon() -> None:
    """End this process shortly: a replica whose engine died must not stay a fast, empty-queued magnet for requests."""
    threading.Timer(_EXIT_DELAY_S, os._exit, args=(1,)).start()


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


# The queue is the engine's own, bounded and counted in sentences: Serve must never become the queue, because its router
# backs off exponentially once a replica is at max_ongoing_requests. The short constant back-off is for bursts that get
# there all the same.
@serve.deployment(
    max_ongoing_requests=1024,
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=_DRAIN_S + 30,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig.model_validate(
        {"initial_backoff_s": 0.005, "backoff_multiplier": 1, "max_backoff_s": 0.01}
    ),
)
class Replica:
    """One Translator, the thread that steps it, and the numbers that autoscaling and people read."""

    _is_wound_up = True  # until there is an engine thread to end

    def __init__(self, pool: str, settings: PoolSettings) -> None:
        config = settings.engine_config()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        logging.getLogger("engine").parent = log  # the engine's warnings go where Serve's go, in the same format
        self._pool = pool
        self._device = config.device
        self._metrics = PoolMetrics(pool)
        self._default_max_pending = config.max_waiting + config.max_source_slots
        self._tuning = PoolTuning()
        checkpoint = settings.checkpoint_path()
        log.info("pool %s: loading %s as %s on %s", pool, checkpoint, config.precision, config.device)
        translator = self._load(checkpoint, config)
        self._languages = translator.languages
        self._thread = EngineThread(translator, max_pending=self._default_max_pending, on_death=exit_soon)
        self._is_wound_up = False
        self._direct = CallServer(self._translate_direct, closed=self._metrics.connection_refused)
        self._counting = threading.Lock()  # the event loop and a timer count
        self._ready_at_s = time.monotonic()
        self._num_offered = 0  # sentences since then, refused ones included
        self._pairs = PairCounter()
        self._num_handle_calls = 0  # open ones that came by Serve's handle
        self._rate = (time.monotonic(), 0, 0.0)  # last sample time, target tokens since then, tokens per second
        self._metrics.memory(plan_memory(ModelConfig.from_checkpoint(checkpoint), config))
        self._levels_soon = Soon(self._record_levels)
        self._record_levels()

    def _record_levels(self) -> None:
        with self._counting:
            self._metrics.level(self._thread.stats, self._thread.num_pending)
            self._metrics.paid(self._tuning.usd_per_hour)

    def _load(self, checkpoint: Path, config: EngineConfig) -> Engine:
        from engine.translator import Translator  # loads torch: replicas only

        require_device(config.device)
        translator = Translator.load(checkpoint, config)
        # What is loaded stays to the end. Looking it all over for garbage stops the engine's thread for some 0.2 s a time.
        gc.collect()
        gc.freeze()
        return translator

    def _replica_id(self) -> str:
        return serve.get_replica_context().replica_id.unique_id

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply PoolTuning in place. Serve may call this again with the same values."""
        with self._counting:
            self._metrics.paid(self._tuning.usd_per_hour)  # up to now at the old price
        self._tuning = PoolTuning.model_validate(user_config)
        self._thread.max_pending = self._tuning.max_pending or self._default_max_pending
        self._direct.hello_timeout_s = self._tuning.hello_timeout_s
        self._direct.max_strangers = self._tuning.max_strangers

    async def translate(self, requests: list[TranslationRequest]) -> TranslateReply:
        """Translate one HTTP request's sentences; full, bad and dead are answers, not exceptions."""
        with span("replica.translate", pool=self._pool, sentences=len(requests)) as current:
            started_at_s = time.time()
            self._count(len(requests), 0)
            self._pairs.offered(requests)
            self._num_handle_calls += 1
            try:
                reply = await self._translate(requests)
            finally:
                self._num_handle_calls -= 1
            if isinstance(reply, Translated):
                record_sentences(current, reply.translations, started_at_s)
        return reply

    async def _translate(self, requests: list[TranslationRequest]) -> TranslateReply:
        try:
            outcome = await self._outcome(requests)
        except EngineDeadError as error:
            await asyncio.sleep(_EXIT_DELAY_S)  # the process ends meanwhile, and the ingress asks another replica
            outcome = error
        return self._reply(requests, outcome)

    async def _outcome(self, requests: list[TranslationRequest]) -> Outcome:
        """What the engine makes of a call. Raises EngineDeadError when it did not take it."""
        try:
            return await self._thread.translate(requests)
        except (EngineFullError, RefusedError, EngineFailedError) as error:
            return error
        except asyncio.CancelledError:
            self._metrics.cancelled(len(requests))
            raise

    async def _translate_direct(self, requests: list[TranslationRequest], trace: Mapping[str, str]) -> TranslateReply:
        """As translate, for a call that did not come by Serve. Raises EngineDeadError when nothing was started."""
        started_at_s = time.time()
        self._count(len(requests), 0)
        self._pairs.offered(requests)
        reply = self._reply(requests, await self._outcome(requests))
        current = past_span("replica.translate", trace, started_at_s, pool=self._pool, sentences=len(requests))
        if isinstance(reply, Translated):
            record_sentences(current, reply.translations, started_at_s)
        current.end()
        return reply

    def _reply(self, requests: Sequence[TranslationRequest], outcome: Outcome) -> TranslateReply:
        """The answer to a call, which is counted."""
        self._levels_soon.request()
        if isinstance(outcome, tuple):
            for request, translation in zip(requests, outcome, strict=True):
                self._metrics.finished(request, translation)
            self._count(0, sum(translation.num_target_tokens for translation in outcome))
            self._pairs.finished(requests, outcome)
            return Translated(outcome)
        match outcome:
            case EngineFullError():
                self._metrics.rejected("busy")
                return Busy()
            case RefusedError(index=index, error=error):
                self._metrics.rejected(error.code)
                return Refused(index, error.code, error.message)
            case _:
                return Failed(str(outcome))

    def _count(self, num_offered: int, num_tokens: int) -> None:
        with self._counting:
            self._num_offered += num_offered
            sampled_at, tokens, per_s = self._rate
            self._rate = (sampled_at, tokens + num_tokens, per_s)

    async def call_address(self) -> CallAddress:
        """Where direct calls go. Raises EngineDeadError when none should come."""
        self._thread.check(self._tuning.stuck_after_s)
        return await self._direct.address(self._replica_id(), _node_address())

    async def status(self) -> ReplicaStatus:
        """Languages and counts of this replica. Raises EngineDeadError when it should not be counted as alive."""
        self._thread.check(self._tuning.stuck_after_s)
        return ReplicaStatus(
            replica_id=self._replica_id(),
            device=self._device,
            languages=self._languages,
            stats=self._thread.stats,
            uptime_s=time.monotonic() - self._ready_at_s,
        )

    def check_health(self) -> None:
        """Serve replaces this replica when this raises: the engine thread died or is stuck."""
        self._record_levels()
        self._thread.check(self._tuning.stuck_after_s)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Load of this replica for an autoscaling policy: sentences, rows, target tokens per second since the last call, and
        characters and tokens by language pair.
        """
        with self._counting:
            sampled_at, tokens, _ = self._rate
            now = time.monotonic()
            per_s = tokens / max(now - sampled_at, 1e-3)
            self._rate = (now, 0, per_s)
        stats = self._thread.stats
        self._record_levels()
        return {
            OFFERED: float(self._num_offered),
            UPTIME: now - self._ready_at_s,
            WAITING: float(stats.num_waiting),
            OPEN_CALLS: float(self._direct.num_open + self._num_handle_calls),
            "running_sentences": float(stats.num_running),
            "pending_sentences": float(self._thread.num_pending),
            "row_utilization": stats.num_live_rows / stats.max_rows,
            "target_tokens_per_s": per_s,
            **self._pairs.report(),
        }

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this at a graceful stop, after the last request that it knows of, and awaits what it returns."""
        if self._is_wound_up:  # by Serve: now it is Python that deletes
            return None
        self._is_wound_up = True
        return self._wind_up()

    async def _wind_up(self) -> None:
        self._direct.stop_taking_calls()
        await asyncio.to_thread(self._thread.stop, drain_s=_DRAIN_S)  # the event loop sends the answers meanwhile
        await self._direct.close()
