"""Pools as the ingress sees them: what crosses the wire, and the client that calls replicas.

A list of `TranslationRequest` goes out, one of the small records below comes back. "Busy" and "refused" are values: cheap
to send and not errors of the replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
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

from app.errors import ServiceError
from engine.types import EngineStats, Translation, TranslationRequest

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
)


@dataclass(frozen=True, slots=True)
class Translated:
    """Results in the order of the requests."""

    translations: tuple[Translation, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """The replica's queue is full; nothing was started."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot serve request `index`; nothing was started. `code` as in engine.types.RequestError."""

    index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine broke down; the replica is about to be replaced."""

    message: str


TranslateReply = Translated | Busy | Refused | Failed


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


class RayPool:
    """A pool behind a Ray Serve handle.

    on_lost(pool, error name) is called for every call whose replica was lost.
    """

    def __init__(
        self, name: str, handle: Any, retry_after_s: int = 1, *, on_lost: Callable[[str, str], None] | None = None
    ) -> None:
        self._name = name
        self._handle = handle
        self._retry_after_s = retry_after_s
        self._on_lost = on_lost

    async def translate(self, requests: Sequence[TranslationRequest], budget_s: float) -> TranslateReply:
        """One handle call for the whole list; once more elsewhere when the replica was lost.

        Failed is not tried again: a sentence that breaks an engine would break a second one.
        """
        deadline = time.monotonic() + budget_s
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return await self._call(requests, deadline - time.monotonic())
            except LOST_REPLICA_ERRORS as error:
                reason = type(error).__name__
                log.warning("pool %s: replica lost in attempt %d: %s", self._name, attempt + 1, reason)
                if self._on_lost is not None:
                    self._on_lost(self._name, reason)
        raise self._unavailable("its replicas died while translating")

    async def _call(self, requests: Sequence[TranslationRequest], remaining_s: float) -> TranslateReply:
        response = self._handle.translate.remote(list(requests))
        try:
            reply: TranslateReply = await asyncio.wait_for(response, max(0.001, remaining_s))
        except TimeoutError:
            response.cancel()  # wait_for alone would leave the replica working
            raise ServiceError("deadline_exceeded", "the time budget of the request ran out") from None
        except asyncio.CancelledError:
            response.cancel()
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
            raise self._unavailable(type(error).__name__) from error
        alive = tuple(reply for reply in replies if isinstance(reply, ReplicaStatus))
        if not alive:
            raise self._unavailable(f"none of its {len(replies)} replicas is healthy")
        return alive

    def _unavailable(self, reason: str) -> ServiceError:
        return ServiceError(
            "pool_unavailable", f"pool {self._name} does not answer: {reason}", retry_after_s=self._retry_after_s
        )


Pools = Mapping[str, Pool]
