"""The deployment that owns one Translator on its device. Only app.serve names it; torch loads inside `__init__`."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from app.autoscaling.feed import OFFERED, UPTIME, WAITING
from app.engine_thread import Engine, EngineDeadError, EngineFailedError, EngineThread, RefusedError
from app.metrics import PoolMetrics
from app.pools import Busy, Failed, Refused, ReplicaStatus, Translated, TranslateReply
from app.settings import PoolSettings, PoolTuning
from app.tracing import record_sentences, span
from engine.accounting import plan_memory
from engine.config import EngineConfig, ModelConfig
from engine.types import EngineFullError, TranslationRequest

log = logging.getLogger("ray.serve")

_DRAIN_S = 30.0
_EXIT_DELAY_S = 0.5  # long enough for the failed calls to be answered


def exit_soon() -> None:
    """End this process shortly: a replica whose engine died must not stay a fast, empty-queued magnet for requests."""
    threading.Timer(_EXIT_DELAY_S, os._exit, args=(1,)).start()


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

    def __init__(self, pool: str, settings: PoolSettings) -> None:
        config = settings.engine_config()
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
        self._ready_at_s = time.monotonic()
        self._num_offered = 0  # sentences since then, refused ones included
        self._rate = (time.monotonic(), 0, 0.0)  # last sample time, target tokens since then, tokens per second
        self._metrics.memory(plan_memory(ModelConfig.from_checkpoint(checkpoint), config))
        self._record_levels()

    def _record_levels(self) -> None:
        self._metrics.level(self._thread.stats, self._thread.num_pending)
        self._metrics.paid(self._tuning.usd_per_hour)

    def _load(self, checkpoint: Path, config: EngineConfig) -> Engine:
        from engine.translator import Translator  # loads torch: replicas only

        return Translator.load(checkpoint, config)

    def _replica_id(self) -> str:
        return serve.get_replica_context().replica_id.unique_id

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply PoolTuning in place. Serve may call this again with the same values."""
        self._metrics.paid(self._tuning.usd_per_hour)  # up to now at the old price
        self._tuning = PoolTuning.model_validate(user_config)
        self._thread.max_pending = self._tuning.max_pending or self._default_max_pending

    async def translate(self, requests: list[TranslationRequest]) -> TranslateReply:
        """Translate one HTTP request's sentences; full, bad and dead are answers, not exceptions."""
        with span("replica.translate", pool=self._pool, sentences=len(requests)) as current:
            started_at_s = time.time()
            self._num_offered += len(requests)
            reply = await self._translate(requests)
            if isinstance(reply, Translated):
                record_sentences(current, reply.translations, started_at_s)
        return reply

    async def _translate(self, requests: list[TranslationRequest]) -> TranslateReply:
        try:
            translations = await self._thread.translate(requests)
        except EngineFullError:
            self._metrics.rejected("busy")
            return Busy()
        except RefusedError as refused:
            self._metrics.rejected(refused.error.code)
            return Refused(refused.index, refused.error.code, refused.error.message)
        except EngineFailedError as error:
            return Failed(str(error))
        except EngineDeadError as error:
            await asyncio.sleep(_EXIT_DELAY_S)  # the process ends meanwhile, and the ingress asks another replica
            return Failed(str(error))
        except asyncio.CancelledError:
            self._metrics.cancelled(len(requests))
            raise
        for request, translation in zip(requests, translations, strict=True):
            self._metrics.finished(request, translation)
        sampled_at, tokens, per_s = self._rate
        self._rate = (sampled_at, tokens + sum(t.num_target_tokens for t in translations), per_s)
        self._record_levels()
        return Translated(translations)

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
        """Load of this replica for an autoscaling policy: sentences, rows, target tokens per second since the last call."""
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
            "running_sentences": float(stats.num_running),
            "pending_sentences": float(self._thread.num_pending),
            "row_utilization": stats.num_live_rows / stats.max_rows,
            "target_tokens_per_s": per_s,
        }

    def __del__(self) -> None:
        """Serve calls this after the last ongoing request, at a graceful stop."""
        if (thread := getattr(self, "_thread", None)) is not None:  # absent when __init__ failed
            thread.stop(drain_s=_DRAIN_S)
