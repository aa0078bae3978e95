"""The closed loop: a fixed number of clients, each of which sends its next request when its last one is answered.

It shows what a service does at a concurrency, and is no proof of a latency: clients that wait for a slow service send less,
so its worst moments are seen by few of them (coordinated omission). For that there is the open loop (loadtest.sender).
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import aiohttp

from loadtest.errors import LoadTestError
from loadtest.outcomes import Outcome, classify
from loadtest.sender import open_session
from loadtest.target import Target
from loadtest.workload import LoadedWorkload, PlannedRequest

_NUM_PLANNED = 2_000  # drawn for a process; it begins again at the first when they are used up
_PAUSE_S = 0.2  # of a client after an answer other than 200: a service that refuses at once must not be flooded
_MEETING_S = 120.0  # for all processes of a level to be up
_TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class Level:
    """num_clients at once, sent by num_processes for warmup_s + duration_s seconds; timeout_s: of one request."""

    num_clients: int
    num_processes: int
    warmup_s: float
    duration_s: float
    timeout_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.num_processes <= self.num_clients:
            raise LoadTestError(f"{self.num_processes} processes for {self.num_clients} clients: choose 1 up to the clients")
        if self.warmup_s < 0 or not self.duration_s > 0 or not self.timeout_s > 0:
            raise LoadTestError("duration and timeout must be above 0 s, the warm-up not below")


@dataclass(slots=True)
class LevelRecord:
    """What ended within the measured seconds, which lie from begin_s to end_s on the machine's monotonic clock; of requests
    that were not answered well also what ended later, or a service that stops answering near the end would look sound.

    latency_s: of requests answered well, in the order of their ends, from the send. cpu_fraction: of one core, of the
    busiest process, warm-up included.
    """

    begin_s: float
    end_s: float
    latency_s: list[float] = field(default_factory=list)
    source_chars: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    cpu_fraction: float = 0.0

    def add(self, other: LevelRecord) -> None:
        """Take in what another process saw; the measured seconds become those that both measured."""
        self.begin_s, self.end_s = max(self.begin_s, other.begin_s), min(self.end_s, other.end_s)
        self.latency_s += other.latency_s
        self.source_chars += other.source_chars
        self.outcomes += other.outcomes
        self.cpu_fraction = max(self.cpu_fraction, other.cpu_fraction)


async def run_clients(target: Target, planned: Sequence[PlannedRequest], level: Level) -> LevelRecord:
    """All clients of `level` in this process. They take turns in `planned`; what is under way at the end is awaited."""
    begin_s = asyncio.get_running_loop().time() + level.warmup_s
    record = LevelRecord(begin_s, begin_s + level.duration_s)
    requests, cpu_started, started = itertools.cycle(planned), time.thread_time(), time.monotonic()
    async with open_session() as session, asyncio.TaskGroup() as clients:
        for _ in range(level.num_clients):
            clients.create_task(_client(session, target.translate_url, requests, level.timeout_s, record))
    record.cpu_fraction = (time.thread_time() - cpu_started) / max(time.monotonic() - started, 1e-9)
    return record


async def _client(
    session: aiohttp.ClientSession, url: str, requests: Iterator[PlannedRequest], timeout_s: float, record: LevelRecord
) -> None:
    loop = asyncio.get_running_loop()
    while (sent_s := loop.time()) < record.end_s:
        request = next(requests)
        outcome = await _exchange(session, url, request, timeout_s)
        ended_s = loop.time()
        is_ok = outcome is Outcome.OK
        if record.begin_s <= ended_s and (ended_s < record.end_s or not is_ok):
            record.outcomes[outcome] += 1
            if is_ok:
                record.latency_s.append(ended_s - sent_s)
                record.source_chars += request.source_chars
        if not is_ok:
            await asyncio.sleep(_PAUSE_S)


async def _exchange(session: aiohttp.ClientSession, url: str, request: PlannedRequest, timeout_s: float) -> Outcome:
    try:
        async with asyncio.timeout(timeout_s), session.post(url, data=request.body, allow_redirects=False) as response:
            body = await response.read()
    except TimeoutError:
        return Outcome.TIMEOUT
    except aiohttp.ClientError:
        return Outcome.CONNECTION
    return classify(response.status, response.headers, body, request.num_texts)[0]


def default_processes(num_clients: int, num_cores: int | None = None) -> int:
    """A quarter of the cores, so that most are the service's; at least 1, at most one a client."""
    return max(1, min(num_clients, (num_cores or os.cpu_count() or 1) // 4))


def run_level(
    target: Target, workload: LoadedWorkload, level: Level, seed: int, tick: Callable[[], None] = lambda: None
) -> LevelRecord:
    """`level` by its processes, which begin together. tick: called some times a second. LoadTestError: one of them died."""
    context = multiprocessing.get_context("spawn")
    number = level.num_processes
    with context.Manager() as manager, ProcessPoolExecutor(number, mp_context=context) as processes:
        meeting, futures = manager.Barrier(number), []
        for index in range(number):
            num_clients = level.num_clients // number + (index < level.num_clients % number)
            part = replace(level, num_clients=num_clients, num_processes=1)
            futures.append(processes.submit(_run_part, target, workload, part, seed * number + index, meeting))
        while wait(futures, _TICK_S).not_done:
            tick()
        try:
            first, *others = [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise LoadTestError(f"a process of the {level.num_clients} clients died; nothing was measured") from error
        except threading.BrokenBarrierError as error:
            raise LoadTestError(
                f"{number} processes did not start within {_MEETING_S:g} s; choose fewer --processes or a quieter machine"
            ) from error
    for other in others:
        first.add(other)
    return first


def _run_part(target: Target, workload: LoadedWorkload, part: Level, seed: int, meeting: threading.Barrier) -> LevelRecord:
    planned = workload.draw(_NUM_PLANNED, seed)
    meeting.wait(_MEETING_S)
    return asyncio.run(run_clients(target, planned, part))
