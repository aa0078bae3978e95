"""Clients that wait for their answers: against queueing arithmetic in virtual time, and as a command over real sockets."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import stat
import threading
import time

import pytest

from loadtest import closed_loop
from loadtest.cli import main
from loadtest.closed_loop import Level, LevelRecord, default_processes, run_clients
from loadtest.errors import LoadTestError
from loadtest.gpu_busy import GpuBusy
from loadtest.outcomes import Outcome
from loadtest.results import ClosedLoopResult
from loadtest.target import Target
from tests.loadtest.runs import SINGLE
from tests.loadtest.stub import StubService, stub_in_thread
from tests.loadtest.virtual_time import run_virtually


def play(stub: StubService, num_clients: int, *, warmup_s: float = 1.0, duration_s: float = 20.0) -> LevelRecord:
    """One level in this process, in virtual time."""
    level = Level(num_clients, 1, warmup_s, duration_s, timeout_s=5.0)

    async def run() -> LevelRecord:
        async with stub.serving() as url:
            return await run_clients(Target(url), SINGLE.draw(50, 1), level)

    return run_virtually(run())


def _come_alone(target, workload, part, seed, meeting):
    """In place of a process's part: the others never come."""
    meeting.wait(0.0)


def test_a_service_without_a_limit_serves_in_proportion_to_the_clients():
    for num_clients in (1, 7, 40):
        record = play(StubService(lambda _: 0.25), num_clients)
        assert record.outcomes == {Outcome.OK: len(record.latency_s)}
        assert len(record.latency_s) == pytest.approx(num_clients * 20 / 0.25, rel=0.03)
        assert sorted(record.latency_s)[len(record.latency_s) // 2] == pytest.approx(0.25, rel=0.03)


def test_a_single_server_keeps_its_rate_and_its_clients_wait_in_line():
    """Little's law: clients = rate x latency."""
    record = play(StubService(lambda _: 0.1, one_by_one=True), 8)
    assert len(record.latency_s) == pytest.approx(20 / 0.1, rel=0.02)
    assert sum(record.latency_s) / len(record.latency_s) == pytest.approx(8 * 0.1, rel=0.02)


def test_the_warm_up_does_not_count():
    """A service that takes 4 s for its first requests: seen without a warm-up, not seen with one."""
    slow_start = lambda number: 4.0 if number < 3 else 0.1  # noqa: E731
    assert max(play(StubService(slow_start), 3, warmup_s=0.0).latency_s) == pytest.approx(4.0, rel=0.01)
    assert max(play(StubService(slow_start), 3, warmup_s=5.0).latency_s) == pytest.approx(0.1, rel=0.05)


def test_every_kind_of_bad_answer_is_counted_and_its_client_goes_on():
    kinds = {3: "500", 4: "refused", 5: "drop", 6: "hang", 7: "short", 8: "empty", 9: "html", 10: "404"}
    record = play(StubService(lambda _: 0.1, kinds=kinds), 2, warmup_s=0.0)
    ok = record.outcomes.pop(Outcome.OK)
    assert record.outcomes == {
        Outcome.SERVER_ERROR: 1,
        Outcome.REFUSED: 1,
        Outcome.CONNECTION: 1,
        Outcome.TIMEOUT: 1,
        Outcome.MALFORMED: 3,
        Outcome.CLIENT_ERROR: 1,
    }
    assert ok == len(record.latency_s) > 200  # two clients for 20 s, one of them 5 s without an answer
    assert max(record.latency_s) < 0.2


def test_a_service_that_stops_answering_near_the_end_does_not_look_sound():
    """Three clients' last requests hang past the measured seconds, until their timeouts."""
    record = play(StubService(lambda _: 0.1, kinds=dict.fromkeys(range(24, 99), "hang")), 3, warmup_s=0.0, duration_s=1.0)
    assert record.outcomes == {Outcome.OK: 24, Outcome.TIMEOUT: 3}


def test_processes_that_do_not_meet_are_a_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(closed_loop, "_run_part", _come_alone)
    with stub_in_thread(lambda _: 0.05) as url:
        arguments = ["--clients", "2", "--processes", "2", "--no-progress", "--output", str(tmp_path / "x.json")]
        assert main(["closed", "--url", url, *arguments]) == 2
    assert "2 processes did not start within 120 s; choose fewer --processes" in capsys.readouterr().err


def test_a_client_that_is_refused_does_not_flood_the_service():
    stub = StubService(lambda _: 0.0, kinds=dict.fromkeys(range(100_000), "refused"))
    record = play(stub, 4, duration_s=10.0)
    assert record.latency_s == []
    assert record.outcomes[Outcome.REFUSED] == pytest.approx(4 * 10 / closed_loop._PAUSE_S, rel=0.05)


def test_records_of_processes_add_up_over_the_seconds_that_all_measured():
    one, other = LevelRecord(1.0, 6.0, [0.1], 10, cpu_fraction=0.2), LevelRecord(1.5, 6.5, [0.3, 0.2], 5, cpu_fraction=0.1)
    one.outcomes[Outcome.OK], other.outcomes[Outcome.OK], other.outcomes[Outcome.TIMEOUT] = 1, 2, 1
    one.add(other)
    assert (one.begin_s, one.end_s, one.source_chars, one.cpu_fraction) == (1.5, 6.0, 15, 0.2)
    assert sorted(one.latency_s) == [0.1, 0.2, 0.3]
    assert one.outcomes == {Outcome.OK: 3, Outcome.TIMEOUT: 1}


def test_processes_by_default():
    assert [default_processes(clients, 16) for clients in (1, 3, 256)] == [1, 3, 4]
    assert default_processes(256, 2) == 1


@pytest.mark.real_time
def test_the_command_measures_over_real_sockets_in_two_processes(tmp_path, capsys):
    output = tmp_path / "closed.json"
    with stub_in_thread(lambda _: 0.2) as url:
        arguments = ["--clients", "1,6", "--processes", "2", "--duration", "2", "--warmup", "0.5", "--no-progress"]
        assert main(["closed", "--url", url, *arguments, "--timeout", "120", "--output", str(output)]) == 0
    result = ClosedLoopResult.model_validate_json(output.read_text())
    one, six = result.levels
    assert (one.num_clients, one.num_processes, six.num_clients, six.num_processes) == (1, 1, 6, 2)
    assert 1 <= one.counts.ok <= 10  # 2 s at 0.2 s each; fewer on a busy machine, never more
    assert one.counts.ok < six.counts.ok <= 60
    assert six.counts.ok == six.counts.sent == six.latency.count
    assert six.requests_per_s == six.counts.ok / 2
    assert six.latency.p50_s > 0.199
    out = capsys.readouterr().out
    assert out.startswith(" clients  requests/s")
    assert f"written: {output}" in out


def test_answers_that_are_no_translations_decide_the_exit_status(tmp_path, capsys):
    async def serve(ready: threading.Event, stop: threading.Event, urls: list[str]) -> None:
        async with StubService(lambda _: 0.01, kinds=dict.fromkeys(range(100_000), "empty")).serving() as url:
            urls.append(url)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    ready, stop, urls = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: asyncio.run(serve(ready, stop, urls)), daemon=True)
    thread.start()
    assert ready.wait(60)
    arguments = ["--clients", "2", "--duration", "1", "--warmup", "0", "--no-progress", "--output", str(tmp_path / "x.json")]
    assert main(["closed", "--url", urls[0], *arguments]) == 1
    stop.set()
    thread.join(10)
    assert "x 200, but not the promised JSON" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["levels"][0]["requests_per_s"] == 0


def test_a_process_that_dies_is_an_error_and_writes_nothing(tmp_path, capsys):
    killed = []

    def kill_a_child(_: int) -> float:
        if not killed:
            killed.append(next(c for c in multiprocessing.active_children() if not c.name.startswith("SyncManager")))
            killed[0].kill()
        return 0.05

    with stub_in_thread(kill_a_child) as url:
        arguments = ["--clients", "4", "--processes", "2", "--duration", "30", "--no-progress"]
        assert main(["closed", "--url", url, *arguments, "--output", str(tmp_path / "x.json")]) == 2
    assert killed
    assert "a process of the 4 clients died; nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "1,x"], "expected numbers such as 1,32,256"),
        (["--clients", "0"], "at least 1"),
        (["--processes", "0"], "0 processes for 1 clients"),
        (["--duration", "0"], "duration and timeout must be above 0 s"),
        (["--seed", "-1"], "--seed cannot be negative"),
        (["--url", "http://10.0.0.1"], "add --allow-remote"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments, message, capsys, tmp_path):
    assert main(["closed", *arguments, "--output", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_level_refuses_what_cannot_be():
    with pytest.raises(LoadTestError, match="3 processes for 2 clients"):
        Level(2, 3, 0.0, 1.0, 1.0)


def test_gpus_are_as_busy_as_nvidia_smi_says(tmp_path, monkeypatch):
    """Two GPUs, one of which tells nothing in its second sample, and a line that never ends."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "$@" > "$0.arguments"\n'
        'printf "0, 40\\n1, 100\\n0, 60\\n1, [N/A]\\n0, 8"\nexec sleep 60 >/dev/null\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begun = time.monotonic()
    with GpuBusy() as gpus:
        give_up = time.monotonic() + 60
        while len(gpus.between(begun, time.monotonic())) < 2 or gpus.between(begun, time.monotonic())["0"] == 0.4:
            assert time.monotonic() < give_up
            time.sleep(0.01)
    assert gpus.between(begun, time.monotonic()) == {"0": pytest.approx(0.5, abs=0.17), "1": 1.0}
    assert gpus.between(begun - 10, begun) == {}
    assert "--query-gpu=index,utilization.gpu" in (tmp_path / "nvidia-smi.arguments").read_text()


def test_without_nvidia_smi_nothing_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with GpuBusy() as gpus:
        pass
    assert gpus.between(0, float("inf")) == {}
