"""Several sender processes against a stub, in real time: the same requests as from one, and nothing lost in silence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loadtest import sender_processes
from loadtest.arrivals import Schedule
from loadtest.errors import LoadTestError
from loadtest.execution import Execution, VerdictDetector
from loadtest.outcomes import Outcome, Recording
from loadtest.results import load_result
from loadtest.sender import OpenLoopSender, SenderOptions
from loadtest.sender_processes import SenderProcesses, processes_needed
from loadtest.slo import ServiceLevel
from loadtest.target import Target
from loadtest.workload import PlannedRequest
from tests.loadtest.runs import at_times, context, poisson
from tests.loadtest.stub import StubService, stub_in_thread

pytestmark = pytest.mark.real_time

OPTIONS = SenderOptions(timeout_s=120, max_in_flight=400)


def numbered(count: int) -> list[PlannedRequest]:
    """Requests that a stub can tell apart."""
    bodies = [
        json.dumps({"source_lang": "en", "target_lang": "de", "texts": [str(number)]}).encode() for number in range(count)
    ]
    return [PlannedRequest(0, body, 1, len(str(number))) for number, body in enumerate(bodies)]


def numbers(stub: StubService) -> list[int]:
    return [int(body["texts"][0]) for body in stub.bodies]


def send(
    stub: StubService,
    schedule: Schedule,
    num_processes: int,
    meanwhile: Callable[[], None] | None = None,
    after_s: float = 0,
) -> tuple[Recording, list[str]]:
    """One run; `meanwhile` is called after_s seconds after the first request reached the stub."""

    async def watch() -> None:
        while not stub.arrived_s:
            await asyncio.sleep(0.01)
        await asyncio.sleep(after_s)
        if meanwhile is not None:
            meanwhile()

    async def run() -> tuple[Recording, list[str]]:
        planned = numbered(len(schedule.times_s))
        async with stub.serving() as url:
            sender: OpenLoopSender | SenderProcesses
            if num_processes == 1:
                sender = OpenLoopSender(Target(url), Recording.empty(schedule.times_s), planned, OPTIONS)
            else:
                sender = SenderProcesses(Target(url), schedule.times_s, planned, OPTIONS, num_processes)
            watching = asyncio.create_task(watch())
            recording = await sender.run()
            await watching
            assert sender.num_processes == num_processes
            return recording, sender.faults

    return asyncio.run(run())


def sender_process(number: int) -> multiprocessing.Process:
    return next(p for p in multiprocessing.active_children() if p.name == f"loadtest sender {number}")


def test_three_processes_send_what_one_sends():
    schedule, delays = poisson(60, 2), [0.01, 0.05, 0.12]
    alone, together = StubService(lambda i: delays[i % 3]), StubService(lambda i: delays[i % 3])
    one, _ = send(alone, schedule, 1)
    three, faults = send(together, schedule, 3)
    assert faults == []
    assert sorted(numbers(alone)) == sorted(numbers(together)) == list(range(len(schedule.times_s)))
    for recording in (one, three):
        assert np.array_equal(recording.intended_s, schedule.times_s)
        assert recording.begun.all()
        assert (recording.outcome == Outcome.OK).all()
        assert (recording.sent_s >= schedule.times_s).all()  # never early
        assert (recording.done_s > recording.sent_s).all()
        assert np.isfinite(recording.server_s["total"]).all()
        assert recording.never_sent() == []
    assert np.allclose(np.sort(one.server_s["total"]), np.sort(three.server_s["total"]))


def test_all_processes_count_from_the_same_moment():
    """By the stub's clock, the machine's, a request arrives after it was sent, and its answer after it was made.

    So each process's zero lies between two moments, the shortest ways apart, and one moment has to suit all three.
    """
    stub, schedule = StubService(), poisson(60, 2)
    recording, _ = send(stub, schedule, 3)
    order = np.argsort(numbers(stub))
    latest = np.array(stub.arrived_s)[order] - recording.sent_s
    earliest = np.array([stub.answered_s[i] for i in range(len(order))])[order] - recording.done_s
    bounds = [(earliest[number::3].max(), latest[number::3].min()) for number in range(3)]
    assert max(low for low, _ in bounds) <= min(high for _, high in bounds), bounds


def test_a_killed_process_stops_the_run_and_every_request_is_accounted_for():
    stub, schedule = StubService(lambda _: 0.05), poisson(60, 30)
    recording, faults = send(stub, schedule, 3, lambda: os.kill(sender_process(2).pid, signal.SIGKILL), after_s=1.0)
    arrived = set(numbers(stub))
    sent = set(np.flatnonzero(recording.begun).tolist())
    assert arrived <= sent
    assert sent - arrived <= set(range(1, len(schedule.times_s), 3))  # at most what lay in the dead process's hands
    unsent = {number for first, last in recording.never_sent() for number in range(first, last + 1)}
    assert unsent == set(range(len(schedule.times_s))) - sent
    assert len(unsent) > 100  # of 1,800; after a second, or later where the machine is slow
    mine = sorted(unsent & set(range(1, len(schedule.times_s), 3)))
    (fault,) = faults
    assert "sender process 2 of 3 was killed by signal 9" in fault
    assert f"{len(mine)} of its {len(range(1, len(schedule.times_s), 3))} requests were never sent" in fault
    assert f"numbers {mine[0]} to {mine[-1]} of the schedule in steps of 3" in fault
    others = np.arange(len(schedule.times_s)) % 3 != 1
    assert (recording.outcome[others & recording.begun] == Outcome.OK).all()  # what was under way was awaited
    assert not multiprocessing.active_children()


def test_the_lag_of_one_process_is_in_the_lag_of_the_run():
    def freeze() -> None:
        process = sender_process(3)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.6)  # the stub stands still too, but is not late by it: it sends nothing
        os.kill(process.pid, signal.SIGCONT)

    stub, schedule = StubService(), poisson(60, 5)  # a busy machine may be late with the freeze
    recording, faults = send(stub, schedule, 3, freeze, after_s=0.5)
    assert faults == []
    lag = recording.sent_s - recording.intended_s
    assert lag[2::3].max() > 0.3
    assert np.isfinite(lag).all()
    assert (recording.outcome == Outcome.OK).all()


def test_a_result_of_several_processes_says_so_and_merges_their_requests():
    async def run(num_processes: int):
        schedule = poisson(40, 2)
        options = SenderOptions(timeout_s=120, num_processes=num_processes)
        async with StubService(lambda i: 0.2 if i % 10 else 1.0).serving() as url:
            return await Execution(context(url, schedule, options=options, max_lag_s=60.0)).run()

    one, two = asyncio.run(run(1)), asyncio.run(run(2))
    assert (one.client.num_processes, two.client.num_processes) == (1, 2)
    assert one.counts == two.counts
    assert one.latency.count == two.latency.count == one.client.send_lag.count == two.client.send_lag.count
    sums = [sum(pair.source_chars for pair in run.by_pair) for run in (one, two)]
    assert sums[0] == sums[1] > 0
    assert two.server_timing["total"].max_s == pytest.approx(1.0, rel=0.01)
    assert two.client.cpu_fraction > 0
    assert two.valid, two.invalid_because


def test_early_stopping_looks_at_all_processes():
    async def run():
        slo = ServiceLevel(latency_s=0.2, percentile=95)
        detector = VerdictDetector(slo, 0.95, 0.0, [50.0])
        options = SenderOptions(timeout_s=120, num_processes=2)
        async with StubService(lambda _: 1.0).serving() as url:
            execution = Execution(context(url, poisson(40, 60), slo=slo, options=options, max_lag_s=60.0), detector=detector)
            return await execution.run(), execution.decided_early

    result, early = asyncio.run(run())
    assert early
    assert result.slo_verdict == "missed"
    assert 0 < result.counts.sent < result.schedule.num_scheduled
    assert result.counts.pending == 0
    assert result.never_sent[-1][1] == result.schedule.num_scheduled - 1
    assert result.valid, result.invalid_because


def _die_at_once(share, line) -> None:
    os._exit(3)


def test_a_process_that_dies_before_the_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sender_processes, "_send_share", _die_at_once)
    with pytest.raises(LoadTestError, match="ended with exit status 3 before the run began"):
        send(StubService(), poisson(20, 1), 2)
    assert not multiprocessing.active_children()


def children(pid: int) -> list[int]:
    """Sender processes of `pid` (Linux)."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Not if it has ended and nobody has collected it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


@contextlib.contextmanager
def command(url: str, output: Path):
    arguments = ["--rate", "40", "--duration", "60", "--processes", "2", "--max-lag-ms", "60000", "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest", "run", "--url", url, *arguments, "--no-progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_a_run_of_two_processes_and_keeps_what_was_measured(tmp_path):
    seen: list[int] = []
    with stub_in_thread(lambda i: seen.append(i) or 0.1) as url, command(url, tmp_path / "run.json") as process:
        until(lambda: len(seen) > 40)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the sender processes too
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 1, output
    run = load_result(tmp_path / "run.json")
    assert run.counts.sent == run.counts.ok >= 10
    assert any("stopped after" in reason for reason in run.invalid_because)
    assert "never sent: numbers" in output
    assert "Traceback" not in output


def test_sender_processes_end_with_the_one_that_started_them(tmp_path):
    seen: list[int] = []
    with stub_in_thread(lambda i: seen.append(i) or 0.1) as url, command(url, tmp_path / "run.json") as process:
        until(lambda: len(seen) > 5)
        senders = children(process.pid)
        assert len(senders) == 2
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not any(map(is_running, senders)))


@pytest.mark.parametrize(
    ("times_s", "cores", "needed"),
    [
        (np.arange(0, 10, 0.01), 16, 1),  # 100 a second
        (np.arange(0, 10, 1 / 900), 16, 3),
        (np.arange(0, 10, 1 / 900), 2, 1),
        (np.arange(0, 10, 1 / 90_000), 8, 7),
        (np.concatenate([np.arange(0, 9, 0.1), np.full(1000, 9.5)]), 16, 3),  # one burst
        (np.array([0.0]), 1, 1),
    ],
)
def test_as_many_processes_as_the_busiest_second_needs(times_s, cores, needed):
    assert processes_needed(times_s, cores) == needed


def test_more_processes_than_requests_in_flight_are_refused():
    with pytest.raises(LoadTestError, match="choose 1 up to max-in-flight"):
        SenderOptions(max_in_flight=2, num_processes=3)
    with pytest.raises(LoadTestError, match="choose 1 up to max-in-flight"):
        SenderOptions(num_processes=0)


def test_rows_of_a_record_that_nobody_sent():
    recording = Recording.empty(at_times([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).times_s)
    assert recording.never_sent() == [(0, 5)]
    recording.share(1, 3).begun[:] = True
    assert recording.never_sent() == [(0, 0), (2, 3), (5, 5)]
    recording.share(0, 1).begun[:] = True
    assert recording.never_sent() == []
