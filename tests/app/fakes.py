"""A translator that pretends, and a pool of it without Ray: the real Replica and EngineThread around a scripted engine."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.errors import ServiceError
from app.pools import ReplicaStatus
from app.replica import Replica
from app.settings import PoolSettings
from app.wire import TranslateReply
from engine.config import EngineConfig
from engine.types import (
    EngineFullError,
    EngineStats,
    FinishReason,
    Hypothesis,
    RequestError,
    Timings,
    Translation,
    TranslationRequest,
)

LANGUAGES = ("deu_Latn", "eng_Latn", "fra_Latn", "jpn_Jpan")


class FakeTranslator:
    """Upper-cases; a sentence takes as many steps as it has words, at most `max_rows` sentences at a time, the rest wait.

    Words with a meaning: `forever` never finishes, `boom` makes step() raise, `error` ends as ERROR, `late` as DEADLINE,
    `cut` ends as LENGTH; a sentence of more than 20 words is too long. While `gate` is cleared, step() blocks, and once
    `is_held` it will not go on before the gate is set.
    """

    def __init__(self, *, max_rows: int = 4, max_waiting: int = 8, step_s: float = 0.0) -> None:
        self.languages = LANGUAGES
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.is_held = False
        self.waiting: list[TranslationRequest] = []
        self.running: dict[str, tuple[TranslationRequest, int]] = {}
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.num_steps = 0
        self.num_faults_in_a_row = 0
        self.threads: set[str] = set()

    def submit(self, request: TranslationRequest) -> None:
        self.threads.add(threading.current_thread().name)
        self.submitted.append(request.request_id)
        if len(request.source_text.split()) > 20:
            raise RequestError("source_too_long", "more than 20 tokens")
        if len(self.waiting) >= self.max_waiting:
            raise EngineFullError
        assert request.request_id not in {r.request_id for r in self.waiting} | self.running.keys()
        self.waiting.append(request)

    def cancel(self, request_id: str) -> bool:
        known = request_id in self.running or any(r.request_id == request_id for r in self.waiting)
        self.running.pop(request_id, None)
        self.waiting = [r for r in self.waiting if r.request_id != request_id]
        self.cancelled.append(request_id)
        return known

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Translation]:
        self.threads.add(threading.current_thread().name)
        if not self.gate.is_set():
            self.is_held = True
            self.gate.wait()
            self.is_held = False
        time.sleep(self.step_s)
        self.num_steps += 1
        while self.waiting and len(self.running) < self.max_rows:
            request = self.waiting.pop(0)
            self.running[request.request_id] = (request, len(request.source_text.split()))
        finished = []
        for request_id, (request, remaining) in list(self.running.items()):
            words = request.source_text.split()
            if "boom" in words:
                raise RuntimeError("device lost")
            self.running[request_id] = (request, remaining if "forever" in words else remaining - 1)
            if self.running[request_id][1] <= 0:
                del self.running[request_id]
                finished.append(self._translation(request))
        return finished

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            num_live_rows=len(self.running),
            max_rows=self.max_rows,
            max_waiting=self.max_waiting,
            num_encode_passes=0,
            num_decode_steps=self.num_steps,
            num_faults_in_a_row=self.num_faults_in_a_row,
        )

    def _translation(self, request: TranslationRequest) -> Translation:
        words = request.source_text.split()
        reasons = {"error": FinishReason.ERROR, "late": FinishReason.DEADLINE, "cut": FinishReason.LENGTH}
        reason = next((reasons[word] for word in words if word in reasons), FinishReason.EOS)
        failed = reason in (FinishReason.ERROR, FinishReason.DEADLINE)
        self.num_faults_in_a_row = self.num_faults_in_a_row + 1 if reason is FinishReason.ERROR else 0
        hypotheses = tuple(
            Hypothesis(request.source_text.upper() + "!" * rank, (5, *range(len(words)), 2), -0.5 - rank)
            for rank in range(request.search.num_hypotheses)
        )
        return Translation(
            request_id=request.request_id,
            hypotheses=() if failed else hypotheses,
            num_source_tokens=len(words) + 2,
            finish_reason=reason,
            timings=Timings(0.001 * len(words), 0.002, 0.003),
            error="scripted" if failed else None,
        )


class LocalReplica(Replica.func_or_class):  # type: ignore[misc]
    """The real replica outside Serve, around a FakeTranslator."""

    def __init__(self, settings: PoolSettings, translator: FakeTranslator) -> None:
        self.translator = translator
        super().__init__("fake", settings)

    def _load(self, checkpoint: Path, config: EngineConfig) -> FakeTranslator:
        return self.translator

    def _replica_id(self) -> str:
        return "local"

    def stopped_by_serve(self) -> Any:
        """What Serve calls at a graceful stop, and awaits."""
        return super().__del__()

    def __del__(self) -> None:
        """Python deletes it, in tests without Serve."""


class LocalPool:
    """app.pools.Pool over one LocalReplica; requests and replies are pickled as on the wire."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica
        self.calls: list[list[TranslationRequest]] = []

    async def translate(self, requests: Sequence[TranslationRequest], budget_s: float) -> TranslateReply:
        self.calls.append(pickle.loads(pickle.dumps(list(requests))))
        try:
            reply = await asyncio.wait_for(self.replica.translate(self.calls[-1]), budget_s)
        except TimeoutError:
            raise ServiceError("deadline_exceeded", "the time budget of the request ran out") from None
        return pickle.loads(pickle.dumps(reply))

    async def status(self) -> tuple[ReplicaStatus, ...]:
        return (await self.replica.status(),)


class Watcher:
    """An app.pools.CallWatcher that remembers."""

    def __init__(self) -> None:
        self.num_open = 0
        self.ended: list[tuple[str, str, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.links: list[int] = []

    def call_began(self, pool: str, way: str) -> None:
        self.num_open += 1

    def call_ended(self, pool: str, way: str, result: str, seconds: float) -> None:
        assert seconds >= 0
        self.num_open -= 1
        self.ended.append((pool, way, result))

    def replica_lost(self, pool: str, reason: str) -> None:
        self.lost.append((pool, reason))

    def linked(self, pool: str, num_replicas: int) -> None:
        self.links.append(num_replicas)
