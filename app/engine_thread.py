"""The thread that steps the engine: asyncio on one side, `submit`, `cancel` and `step` on the other.

The engine is touched by this thread only. A *job* is one call's list of sentences: accepted as a whole or not at all,
answered as a whole, given up as a whole when its caller goes away.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from app.jobs import Answers, Job, Outcome
from engine.types import EngineFullError, EngineStats, RequestError, Translation, TranslationRequest

log = logging.getLogger("ray.serve")

MAX_FAULTS_IN_A_ROW = 16  # one poisonous sentence is no reason; a device on which nothing works any more is
_DRAIN_STEP_S = 5.0  # after the drain time: how long one last step may take before the thread is left behind


class EngineDeadError(RuntimeError):
    """The engine broke down or was stopped before the call: nothing was started, another engine may serve it."""


class EngineFailedError(RuntimeError):
    """The engine broke down with the call's sentences in it; one of them may be the cause."""


class RefusedError(Exception):
    """The engine refuses request `index` of a job; `error` says why."""

    def __init__(self, index: int, error: RequestError) -> None:
        super().__init__(error.message)
        self.index = index
        self.error = error


class Engine(Protocol):
    """What this thread needs of engine.translator.Translator."""

    def submit(self, request: TranslationRequest) -> None:
        """Queue a sentence. Raises RequestError, EngineFullError."""

    def cancel(self, request_id: str) -> bool:
        """Forget a sentence and free its rows."""

    def step(self) -> list[Translation]:
        """One unit of work; the sentences that finished."""

    @property
    def languages(self) -> tuple[str, ...]:
        """FLORES-200 codes it translates between."""

    @property
    def has_work(self) -> bool:
        """True while a sentence waits or runs."""

    def stats(self) -> EngineStats:
        """Counts right now."""


class EngineThread:
    """Owns the engine's time. `max_pending`: sentences held, running ones included, before `translate` refuses."""

    def __init__(self, engine: Engine, *, max_pending: int, on_death: Callable[[], None] | None = None) -> None:
        self.max_pending = max_pending
        self.stats = engine.stats()
        self._engine = engine
        self._on_death = on_death
        self._news = threading.Event()  # something to look at: a job, one given up, a stop
        self._lock = threading.Lock()
        self._inbox: collections.deque[Job] = collections.deque()
        self._hung_up: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}  # by request_id: what the engine holds
        self._ended: dict[Answers, None] = {}  # with outcomes of this round of work, in order
        self._answers: dict[asyncio.AbstractEventLoop, Answers] = {}
        self._num_pending = 0
        self._fault: BaseException | None = None
        self._stopping = False
        self._abandoned = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Sentences accepted and not answered yet."""
        return self._num_pending

    async def translate(self, requests: Sequence[TranslationRequest]) -> tuple[Translation, ...]:
        """Translate all of `requests`, results in their order. Cancelling the caller frees the work within one engine step.

        Raises EngineFullError (queue full), RefusedError (a bad request), EngineDeadError, EngineFailedError.
        """
        if not requests:
            return ()
        loop = asyncio.get_running_loop()
        if (answers := self._answers.get(loop)) is None:
            answers = self._answers[loop] = Answers()
        job = Job(tuple(requests), answers)
        self._accept(job)
        try:
            return await answers.of(job)
        except asyncio.CancelledError:
            self._hung_up.append(job)
            self._news.set()
            raise

    def _accept(self, job: Job) -> None:
        with self._lock:
            self._refuse_if_unable(len(job.requests))
            self._num_pending += len(job.requests)
            self._inbox.append(job)
        self._news.set()

    def check(self, stuck_after_s: float) -> None:
        """Raise EngineDeadError when the thread died, one round of work takes longer than `stuck_after_s` seconds, or
        sentence after sentence fails by itself, as on a broken GPU.
        """
        if self._fault is not None or not self._thread.is_alive():
            raise EngineDeadError(f"the engine thread died: {self._fault!r}")
        since = self._busy_since
        if since is not None and (stuck_s := time.monotonic() - since) > stuck_after_s:
            raise EngineDeadError(f"the engine has been in one step for {stuck_s:.0f} s")
        if (num_faults := self.stats.num_faults_in_a_row) >= MAX_FAULTS_IN_A_ROW:
            raise EngineDeadError(f"the last {num_faults} sentences all failed")

    def stop(self, drain_s: float) -> bool:
        """Refuse new work, finish what is accepted within `drain_s` seconds, fail the rest. True when all finished."""
        with self._lock:
            self._stopping = True
        self._news.set()
        self._thread.join(drain_s)
        drained = not self._thread.is_alive() and self._fault is None
        self._abandoned = True
        self._news.set()
        self._thread.join(_DRAIN_STEP_S)
        return drained

    def _refuse_if_unable(self, num_sentences: int) -> None:
        if self._stopping:
            raise EngineDeadError("the engine is stopping")
        if self._fault is not None or not self._thread.is_alive():
            raise EngineDeadError(f"the engine thread died: {self._fault!r}")
        if self._num_pending + num_sentences > self.max_pending:
            raise EngineFullError(f"{self._num_pending} of {self.max_pending} sentences are pending")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._busy_since = time.monotonic()
                self._forget_hung_up()
                self._admit()
                if self._engine.has_work:
                    for translation in self._engine.step():
                        self._deliver(translation)
                self.stats = self._engine.stats()
                self._hand_over()
                self._busy_since = None
        except BaseException as error:  # a panic of a native library is no Exception; a silent death would hang every caller
            log.exception("the engine thread died with %d sentences pending", self._num_pending)
            with self._lock:
                self._fault = error
            self._fail_all(error)
            if self._on_death is not None:
                self._on_death()
        else:
            self._fail_all(EngineDeadError("it was stopped"))

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the thread should end."""
        while True:
            self._news.clear()  # first: what comes from here on ends the wait below
            if self._abandoned:
                return False
            if self._inbox or self._hung_up or self._engine.has_work:
                return True
            if self._stopping:
                return False
            self._news.wait()

    def _forget_hung_up(self) -> None:
        while self._hung_up:
            job = self._hung_up.popleft()
            for request in job.requests:
                if self._jobs.get(request.request_id) is job:
                    del self._jobs[request.request_id]
                    self._engine.cancel(request.request_id)
            self._release(job)

    def _admit(self) -> None:
        while self._inbox:
            job = self._inbox.popleft()
            if not job.is_over:
                self._submit(job)

    def _submit(self, job: Job) -> None:
        self._jobs.update({request.request_id: job for request in job.requests})  # first: a fault below must find the job
        for index, request in enumerate(job.requests):
            try:
                self._engine.submit(request)
            except RequestError as error:
                return self._withdraw(job, index, RefusedError(index, error))
            except EngineFullError as error:
                return self._withdraw(job, index, error)
            except Exception as error:  # this job's trouble, not its batch mates'
                log.exception("the engine failed on a submitted sentence")
                return self._withdraw(job, index + 1, EngineFailedError(f"the engine failed: {error}"))
        return None

    def _withdraw(self, job: Job, num_submitted: int, error: Exception) -> None:
        for index, request in enumerate(job.requests):
            del self._jobs[request.request_id]
            if index < num_submitted:
                self._engine.cancel(request.request_id)
        self._end(job, error)

    def _deliver(self, translation: Translation) -> None:
        job = self._jobs.pop(translation.request_id, None)
        if job is None:  # cancelled meanwhile
            return
        job.results[translation.request_id] = translation
        if len(job.results) == len(job.requests):
            self._end(job, job.outcome())

    def _end(self, job: Job, outcome: Outcome) -> None:
        if not job.is_over:
            self._release(job)
            job.answers.put(job, outcome)
            self._ended[job.answers] = None

    def _release(self, job: Job) -> None:
        if not job.is_over:
            job.is_over = True
            with self._lock:
                self._num_pending -= len(job.requests)

    def _hand_over(self) -> None:
        ended, self._ended = self._ended, {}
        for answers in ended:
            answers.send()

    def _fail_all(self, error: BaseException) -> None:
        """Fail every job; nothing new arrives any more."""
        with self._lock:
            jobs = {*self._inbox, *self._jobs.values()}
            self._inbox.clear()
            self._jobs.clear()
        for job in jobs:
            self._end(job, EngineFailedError(f"the engine failed: {error}"))
        self._hand_over()
