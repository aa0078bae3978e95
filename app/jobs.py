"""Jobs of the engine thread, and the way their outcomes take to an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.types import Translation, TranslationRequest

Outcome = tuple[Translation, ...] | BaseException  # results in the order of the requests, or why there are none


@dataclass(eq=False)
class Job:
    """Sentences that are answered together."""

    requests: tuple[TranslationRequest, ...]
    answers: Answers
    results: dict[str, Translation] = field(default_factory=dict)
    is_over: bool = False  # answered, failed or given up

    def outcome(self) -> tuple[Translation, ...]:
        """All results, in the order of the requests."""
        return tuple(self.results[request.request_id] for request in self.requests)


class Answers:
    """The way to the event loop it is made in: what ends in one round of work costs the loop one wake-up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Job, asyncio.Future[tuple[Translation, ...]]] = {}
        self._outcomes: list[tuple[Job, Outcome]] = []

    async def of(self, job: Job) -> tuple[Translation, ...]:
        """Wait for the outcome of a job; an exception is raised."""
        self._waiting[job] = self._loop.create_future()
        try:
            return await self._waiting[job]
        finally:
            del self._waiting[job]

    def put(self, job: Job, outcome: Outcome) -> None:
        """One more for the next `send`. In the engine thread."""
        self._outcomes.append((job, outcome))

    def send(self) -> None:
        """At the end of a round of work. In the engine thread."""
        outcomes, self._outcomes = self._outcomes, []
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            self._loop.call_soon_threadsafe(self._resolve, outcomes)

    def _resolve(self, outcomes: Sequence[tuple[Job, Outcome]]) -> None:
        for job, outcome in outcomes:
            answer = self._waiting.get(job)
            if answer is None or answer.done():  # the caller went away meanwhile
                continue
            if isinstance(outcome, BaseException):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
