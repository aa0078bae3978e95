"""Pools as the ingress sees them, and the client that calls their replicas: by Serve's handle, or on a direct connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RpcError,
    WorkerCrashedError,
)
from ray.exceptions import OutOfMemoryError as NodeOutOfMemoryError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from app.call_client import Link, Links, ReplicaGoneError
from app.errors import ServiceError
from app.tracing import carrier
from app.wire import Busy, TranslateReply
from engine.types import EngineStats, TranslationRequest

log = logging.getLogger("ray.serve")

_MAX_ATTEMPTS = 2  # Serve never retries a request whose replica died
_STATUS_TIMEOUT_S = 5.0

# How Ray 2.60 says that whoever held the call is gone: the replica itself (also unreachable for a moment), its worker
# process or node, the owner or the only copy of its answer, or the node's memory monitor that killed it. None of them is an
# answer, and translating again does no harm.
LOST_REPLICA_ERRORS: tuple[type[Exception], ...] = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    NodeOutOfMemoryError,
    ActorPlacementGroupRemoved,
    RpcError,
    ReplicaUnavailableError,
    ReplicaGoneError,  # ours, of a direct connection
)
_NO_ANSWER: tuple[type[BaseException], ...] = (*LOST_REPLICA_ERRORS, TimeoutError, asyncio.CancelledError)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica: its languages (FLORES-200) and its engine's counts. uptime_s: seconds since it was ready."""

    replica_id: str
    device: str
    languages: tuple[str, ...]
    stats: EngineStats
    uptime_s: float


class Pool(Protocol):
    """A set of equal replicas."""

    async def translate(self, requests: Sequence[TranslationRequest], budget_s: float) -> TranslateReply:
        """Translate within `budget_s` seconds. Raises ServiceError: deadline_exceeded, pool_unavailable."""

    async def status(self) -> tuple[ReplicaStatus, ...]:
        """Status of every replica. Raises ServiceError pool_unavailable when none answers in time."""


class CallWatcher(Protocol):
    """Hears of every call of an ingress. way: `direct`, or `handle` for Serve's."""

    def call_began(self, pool: str, way: str) -> None:
        """One was sent."""

    def call_ended(self, pool: str, way: str, result: str, seconds: float) -> None:
        """result: the reply's kind in lower case, or `lost`, `late` (deadline), `given_up` (client left), `unavailable`."""

    def replica_lost(self, pool: str, reason: str) -> None:
        """A replica went away with a call; reason is the name of the error."""

    def linked(self, pool: str, num_replicas: int) -> None:
        """So many replicas take direct calls now."""


class _Nobody:
    """A CallWatcher that forgets."""

    def call_began(self, pool: str, way: str) -> None: ...
    def call_ended(self, pool: str, way: str, result: str, seconds: float) -> None: ...
    def replica_lost(self, pool: str, reason: str) -> None: ...
    def linked(self, pool: str, num_replicas: int) -> None: ...


class RayPool:
    """A pool behind a Ray Serve handle.

    direct: call replicas on connections of our own (app.call_client), by Serve's handle while there is none.
    """

    def __init__(
        self,
        name: str,
        handle: Any,
        retry_after_s: int = 1,
        *,
        direct: bool = False,
        watcher: CallWatcher | None = None,
    ) -> None:
        self._name = name
        self._handle = handle
        self._watcher = watcher or _Nobody()
        self._links = Links(name, handle, lambda num_open: self._watcher.linked(name, num_open)) if direct else None
        self._retry_after_s = retry_after_s

    async def translate(self, requests: Sequence[TranslationRequest], budget_s: float) -> TranslateReply:
        """One call for the whole list; once more elsewhere when the replica was lost.

        Failed is not tried again: a sentence that breaks an engine would break a second one.
        """
        deadline = time.monotonic() + budget_s
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return await self._call(requests, max(0.001, deadline - time.monotonic()))
            except LOST_REPLICA_ERRORS as error:
                reason = type(error).__name__
                log.warning("pool %s: replica lost in attempt %d: %s", self._name, attempt + 1, reason)
                self._watcher.replica_lost(self._name, reason)
            except TimeoutError:
                raise ServiceError("deadline_exceeded", "the time budget of the request ran out") from None
        raise self._unavailable("its replicas died while translating")

    async def _call(self, requests: Sequence[TranslationRequest], remaining_s: float) -> TranslateReply:
        link: Link | None = self._links.least_loaded() if self._links is not None else None
        way, began_at, result = "handle" if link is None else "direct", time.perf_counter(), "unavailable"
        self._watcher.call_began(self._name, way)
        try:
            if link is None:
                reply = await self._call_handle(requests, remaining_s)
            else:
                async with asyncio.timeout(remaining_s):
                    reply = await link.call(requests, carrier())
            result = type(reply).__name__.lower()
        except _NO_ANSWER as error:
            result = {TimeoutError: "late", asyncio.CancelledError: "given_up"}.get(type(error), "lost")
            raise
        finally:
            self._watcher.call_ended(self._name, way, result, time.perf_counter() - began_at)
        return reply

    async def _call_handle(self, requests: Sequence[TranslationRequest], remaining_s: float) -> TranslateReply:
        response = self._handle.translate.remote(list(requests))
        try:
            reply: TranslateReply = await asyncio.wait_for(response, remaining_s)
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()  # wait_for alone would leave the replica working
            raise
        except BackPressureError:
            return Busy()
        except DeploymentUnavailableError as error:
            raise self._unavailable(str(error)) from error
        return reply

    async def status(self) -> tuple[ReplicaStatus, ...]:
        """Ask every running replica; those that cannot answer are left out."""
        broadcast = self._handle.broadcast("status")
        try:
            replies = await asyncio.wait_for(broadcast.results_async(return_exceptions=True), _STATUS_TIMEOUT_S)
        except TimeoutError:
            raise self._unavailable(f"no answer within {_STATUS_TIMEOUT_S:g} s") from None
        except DeploymentUnavailableError as error:
            raise self._unavailable("it has no running replica yet") from error
        alive = tuple(reply for reply in replies if isinstance(reply, ReplicaStatus))
        if not alive:
            raise self._unavailable(f"none of its {len(replies)} replicas is healthy")
        return alive

    def _unavailable(self, reason: str) -> ServiceError:
        return ServiceError(
            "pool_unavailable", f"pool {self._name} does not answer: {reason}", retry_after_s=self._retry_after_s
        )


Pools = Mapping[str, Pool]
