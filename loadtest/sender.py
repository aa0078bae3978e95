"""The open-loop sender: every request goes out at its scheduled time whatever the service does.

Latency counts from the intended time. Concurrency is bounded (max_in_flight) to protect this machine, but a request
that has to wait for its turn keeps its intended time, so that the bound cannot hide a slow service (coordinated
omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

from loadtest.errors import LoadTestError
from loadtest.outcomes import Outcome, Recording, classify
from loadtest.target import Target
from loadtest.workload import PlannedRequest

# epoll sleeps in whole milliseconds and rounds up: wake this early, then let the loop turn until the moment comes.
_TIMER_SLACK_S = 0.0015
_LEAD_S = 0.1  # between opening the session and time 0 of the schedule
_TICK_S = 0.2
_KEEPALIVE_S = 4.0  # less than servers' usual 5 s: reusing a connection while the server closes it would look like its error

Monitor = Callable[[Recording, float], bool]  # called every tick with the seconds since the start; True stops the sending


@dataclass(frozen=True, slots=True)
class SenderOptions:
    """timeout_s counts from the intended send. retry_connection: once more after a connection error.

    num_processes: that send, in turn; None: as many as the schedule needs (loadtest.sender_processes). Each gets its part of
    max_in_flight.
    """

    timeout_s: float = 30.0
    max_in_flight: int = 1000
    retry_connection: bool = False
    num_processes: int | None = 1

    def __post_init__(self) -> None:
        if not self.timeout_s > 0 or self.max_in_flight < 1:
            raise LoadTestError("the timeout must be above 0 s and max-in-flight at least 1")
        if self.num_processes is not None and not 1 <= self.num_processes <= self.max_in_flight:
            raise LoadTestError(
                f"{self.num_processes} sender processes: choose 1 up to max-in-flight ({self.max_in_flight})"
            )


class OpenLoopSender:
    """One run in this process: planned[i] is sent recording.intended_s[i] seconds after the start.

    cpu_fraction: of one core, of this thread, once the run is over.
    """

    def __init__(
        self,
        target: Target,
        recording: Recording,
        planned: Sequence[PlannedRequest],
        options: SenderOptions,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        if len(planned) != len(recording.intended_s):
            raise LoadTestError(f"{len(planned)} requests for {len(recording.intended_s)} send times")
        self.recording = recording
        self.faults: list[str] = []
        self.num_processes = 1
        self.cpu_fraction = 0.0
        self._url = target.translate_url
        self._planned = planned
        self._options = options
        self._monitors = monitors
        self._slots = asyncio.Semaphore(options.max_in_flight)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Send nothing more; what is under way is still awaited."""
        self._stopped.set()

    async def run(self, origin_s: float | None = None) -> Recording:
        """Send everything (or until a stop), wait for the answers, and return the record.

        origin_s: time 0 of the schedule on the loop's clock, which all processes of a machine share; default: very soon.
        """
        loop = asyncio.get_running_loop()
        started_at, cpu_started = loop.time(), time.thread_time()
        async with open_session(_stamps_of_sending()) as session:
            self._origin = loop.time() + _LEAD_S if origin_s is None else origin_s
            with _quiet_gc():
                watch = loop.create_task(self._watch())
                try:
                    await self._send_all(session)
                finally:
                    watch.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await watch
        self._tick()
        self.cpu_fraction = (time.thread_time() - cpu_started) / max(loop.time() - started_at, 1e-9)
        return self.recording

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.TaskGroup() as exchanges:
            for index, offset in enumerate(self.recording.intended_s.tolist()):
                await self._sleep_until(self._origin + offset)
                if self._stopped.is_set():
                    return
                self.recording.held[index] = self._slots.locked()
                self.recording.begun[index] = True
                exchanges.create_task(self._exchange(session, index))

    async def _sleep_until(self, moment: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # even when behind: the requests just made must get their turn
        while (left := moment - loop.time()) > 0 and not self._stopped.is_set():
            await asyncio.sleep(min(left - _TIMER_SLACK_S, _TICK_S) if left > _TIMER_SLACK_S else 0)

    async def _exchange(self, session: aiohttp.ClientSession, index: int) -> None:
        deadline = self._origin + float(self.recording.intended_s[index]) + self._options.timeout_s
        try:
            async with asyncio.timeout_at(deadline), self._slots:
                outcome = await self._post(session, index)
                if outcome is Outcome.CONNECTION and self._options.retry_connection:
                    self.recording.retried[index] = True
                    outcome = await self._post(session, index)
        except TimeoutError:
            outcome = Outcome.TIMEOUT
            self._end(index)
        self.recording.outcome[index] = outcome

    async def _post(self, session: aiohttp.ClientSession, index: int) -> Outcome:
        planned = self._planned[index]
        try:
            async with session.post(
                self._url, data=planned.body, allow_redirects=False, trace_request_ctx=(self, index)
            ) as response:
                body = await response.read()
        except aiohttp.ClientError:
            self._end(index)
            return Outcome.CONNECTION
        self._end(index)
        outcome, chars = classify(response.status, response.headers, body, planned.num_texts)
        self.recording.status[index] = response.status
        self.recording.target_chars[index] = chars
        self.recording.record_server_timing(index, response.headers.get("Server-Timing", ""))
        return outcome

    def mark_sent(self, index: int) -> None:
        """The headers of a request were written; a retry does not move the first time."""
        if self.recording.sent_s[index] != self.recording.sent_s[index]:  # NaN: not sent yet
            self.recording.sent_s[index] = asyncio.get_running_loop().time() - self._origin

    def _end(self, index: int) -> None:
        self.recording.done_s[index] = asyncio.get_running_loop().time() - self._origin

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._tick()

    def _tick(self) -> None:
        now_s = asyncio.get_running_loop().time() - self._origin
        for monitor in self._monitors:
            if monitor(self.recording, now_s):
                self.stop()


@contextlib.asynccontextmanager
async def open_session(*traces: aiohttp.TraceConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """A session of any number of connections to the service itself; deadlines are the caller's."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers={"Content-Type": "application/json", "User-Agent": "babelephant-loadtest"},
        trace_configs=list(traces),
        trust_env=False,  # a proxy from the environment would be measured instead, and may be another machine
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield session


def _stamps_of_sending() -> aiohttp.TraceConfig:
    tracing = aiohttp.TraceConfig()
    tracing.on_request_headers_sent.append(_headers_sent)
    return tracing


async def _headers_sent(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestHeadersSentParams
) -> None:
    sender, index = context.trace_request_ctx
    sender.mark_sent(index)


@contextlib.contextmanager
def _quiet_gc() -> Iterator[None]:
    """No scans of the planned requests by the collector during the run: they show up as send lag."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
