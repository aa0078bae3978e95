"""Several processes send one schedule: request i goes out from process i modulo their number, at the time it always would.

One process is late when the rate is high: a request costs it most of a millisecond of Python. The schedule is fixed before
they start, they count from the same moment of the machine's one clock, and they write into one record in shared memory. So
a run is summarised, watched and stopped like one of a single process, and what a process that dies has recorded is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from loadtest.arrivals import Floats
from loadtest.errors import LoadTestError
from loadtest.outcomes import Outcome, Recording
from loadtest.sender import Monitor, OpenLoopSender, SenderOptions
from loadtest.target import Target
from loadtest.workload import PlannedRequest

# Requests in the busiest second that one process can prove to send on time: at 1,100/s it was late by 29 ms p99 on a
# server's core, with 82 % of the core used.
_PER_PROCESS = 400
_LEAD_S = 0.5  # between telling them when to start and the start
_TICK_S = 0.2
_END_S = 5.0  # for a process to end once it has reported


def processes_needed(times_s: Floats, num_cores: int | None = None) -> int:
    """So many that none sends more than it can prove, and that one core is left for others; at least 1. times_s: rising."""
    in_a_second = np.searchsorted(times_s, times_s + 1) - np.arange(len(times_s))
    return max(1, min(math.ceil(int(in_a_second.max()) / _PER_PROCESS), (num_cores or _num_cores()) - 1))


def _num_cores() -> int:
    """That this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Share:
    """What one process sends. memory: of the record of all requests, whose intended times are intended_s."""

    target: Target
    number: int
    of: int
    intended_s: Floats
    planned: Sequence[PlannedRequest]
    options: SenderOptions
    memory: Any


@dataclass(frozen=True, slots=True)
class _Report:
    """What a process tells at its end. server_s: of the rows of its share."""

    server_s: dict[str, Floats]
    cpu_fraction: float


class SenderProcesses:
    """One run by `num_processes` processes; a caller sees what it sees of OpenLoopSender.

    faults: a sentence for every process that died. cpu_fraction: of one core, of the busiest process.
    """

    def __init__(
        self,
        target: Target,
        schedule_s: Floats,
        planned: Sequence[PlannedRequest],
        options: SenderOptions,
        num_processes: int,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        self._context = multiprocessing.get_context("spawn")  # a fork would take the running loop along
        memory = self._context.RawArray("b", Recording.num_bytes(len(schedule_s)))
        self.recording = Recording.empty(schedule_s, memory)
        self.faults: list[str] = []
        self.num_processes = num_processes
        self.cpu_fraction = 0.0
        self._monitors = monitors
        self._is_stopped = False
        self._senders = [
            _RemoteSender(
                _Share(
                    target,
                    number,
                    num_processes,
                    schedule_s,
                    planned[number::num_processes],
                    replace(options, num_processes=1, max_in_flight=bound),
                    memory,
                )
            )
            for number, bound in enumerate(_dealt(options.max_in_flight, num_processes))
        ]

    def stop(self) -> None:
        """Send nothing more; what is under way is still awaited."""
        self._is_stopped = True
        for sender in self._senders:
            sender.tell(None)

    async def run(self) -> Recording:
        """Start them, have them send everything (or until a stop), wait for the answers, and return the record.

        A process that dies stops the run. Raises LoadTestError when one dies before the start.
        """
        loop = asyncio.get_running_loop()
        try:
            for sender in self._senders:
                sender.start(self._context)
            await asyncio.gather(*(sender.ready for sender in self._senders))
            origin = loop.time() + _LEAD_S
            for sender in self._senders:
                sender.tell(origin)
            if self._is_stopped:  # while they started
                self.stop()
            pending = {sender.ended for sender in self._senders}
            while pending:
                done, pending = await asyncio.wait(pending, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
                if any(ended.result() is None for ended in done):
                    self.stop()
                now_s = loop.time() - origin
                for monitor in self._monitors:
                    if monitor(self.recording, now_s):
                        self.stop()
        finally:
            for sender in self._senders:
                sender.end()
        self._collect()
        return self.recording

    def _collect(self) -> None:
        for sender in self._senders:
            report, share = sender.ended.result(), sender.share
            if report is None:
                self.faults.append(self._fault(sender))
            else:
                self.recording.add_server_timing(share.number, share.of, report.server_s)
                self.cpu_fraction = max(self.cpu_fraction, report.cpu_fraction)

    def _fault(self, sender: _RemoteSender) -> str:
        number, of = sender.share.number, sender.share.of
        rows = self.recording.share(number, of)
        unsent = np.flatnonzero(~rows.begun) * of + number
        num_unknown = int((rows.begun & (rows.outcome == Outcome.PENDING)).sum())
        told = f"sender process {number + 1} of {of} {sender.death}"
        if len(unsent):
            first, last = int(unsent[0]), int(unsent[-1])
            told += (
                f": {len(unsent)} of its {len(rows.begun)} requests were never sent, numbers {first} to {last} of the "
                f"schedule in steps of {of}, the first intended at {self.recording.intended_s[first]:.3f} s"
            )
        return f"{told}; what became of {num_unknown} that it had sent is not known"


class _RemoteSender:
    """A sender process seen from the one that started it. ready, ended: None as the result of `ended` means that it died."""

    def __init__(self, share: _Share) -> None:
        self.share = share
        self.ready: asyncio.Future[None]
        self.ended: asyncio.Future[_Report | None]
        self.process: Any = None
        self._line: Connection | None = None

    def start(self, context: Any) -> None:
        """Start it. It is ready when it has imported everything and holds its requests."""
        loop = asyncio.get_running_loop()
        self.ready, self.ended = loop.create_future(), loop.create_future()
        self._line, other_end = context.Pipe()
        self.process = context.Process(
            target=_send_share, args=(self.share, other_end), name=f"loadtest sender {self.share.number + 1}", daemon=True
        )
        self.process.start()
        other_end.close()  # so that its death shows as the end of the line
        loop.add_reader(self._line.fileno(), self._hear)

    @property
    def death(self) -> str:
        """How it ended."""
        code = self.process.exitcode
        if code is None:
            return "does not answer any more"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"

    def tell(self, message: float | None) -> None:
        """When to start (the loop's clock), or None: send nothing more."""
        if self._line is not None:
            with contextlib.suppress(OSError):  # it died; `_hear` notices
                self._line.send(message)

    def _hear(self) -> None:
        assert self._line is not None
        try:
            message = self._line.recv()
        except (EOFError, OSError):
            self._hang_up()
            self.process.join(_END_S)
            self.ended.set_result(None)
            if not self.ready.done():
                number = self.share.number + 1
                self.ready.set_exception(LoadTestError(f"sender process {number} {self.death} before the run began"))
            return
        if isinstance(message, _Report):
            self._hang_up()
            self.ended.set_result(message)
        else:
            self.ready.set_result(None)

    def _hang_up(self) -> None:
        """A process whose line is gone ends at once."""
        if self._line is not None:
            asyncio.get_running_loop().remove_reader(self._line.fileno())
            self._line.close()
            self._line = None

    def end(self) -> None:
        """It has ended, or ends now."""
        self._hang_up()
        if self.process is not None:
            self.process.join(_END_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


def _dealt(total: int, num_parts: int) -> list[int]:
    """`total` in parts that differ by 1 at most."""
    return [total // num_parts + (number < total % num_parts) for number in range(num_parts)]


def _send_share(share: _Share, line: Connection) -> None:
    """A sender process. Ctrl-C reaches it too, but its parent decides what that means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_obey(share, line))


async def _obey(share: _Share, line: Connection) -> None:
    loop = asyncio.get_running_loop()
    recording = Recording.within(share.memory, share.intended_s).share(share.number, share.of)
    sender = OpenLoopSender(share.target, recording, share.planned, share.options)
    begin: asyncio.Future[float] = loop.create_future()

    def hear() -> None:
        try:
            message = line.recv()
        except EOFError:
            os._exit(1)  # whoever started this is gone, and nobody wants the answers
        if message is None:
            sender.stop()
        else:
            begin.set_result(message)

    loop.add_reader(line.fileno(), hear)
    line.send("ready")
    await sender.run(await begin)
    loop.remove_reader(line.fileno())
    line.send(_Report(recording.server_s, sender.cpu_fraction))
