"""SIGTERM to `babelephant serve` with requests under way, alone as systemd's KillMode=mixed sends it, and to every process
of the service at once, as its default does: what was accepted is answered, and no process stays behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from app.local_cluster import free_ports
from tests.cluster.fleet import REPOSITORY

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 8
TEXTS = ["The connection was lost; trying again in 30 seconds."] * 40


def running(pids: Iterable[int]) -> dict[int, str]:
    """Those of the processes that run, and their command lines."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            folder = Path("/proc") / str(pid)
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[pid] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
    return found


def family(pid: int) -> set[int]:
    """A process and all below it, as a control group holds them together."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found, news = set(), {pid}
    while news:
        found |= news
        news = {child for child, parent in parents if parent in news}
    return found


@pytest.mark.parametrize(
    ("proxy", "to_all"),
    [("haproxy", False), ("python", True), ("haproxy", True)],
    ids=["mixed", "all-python", "all-haproxy"],
)
def test_sigterm_drains(
    proxy: str, to_all: bool, tmp_path: Path, ray_environment: str, report_figure: Callable[[str], None]
) -> None:
    (port,) = free_ports(1)
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port), "--timeout", "100", "--proxy", proxy]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=REPOSITORY
        )
    try:
        assert process.stdout is not None
        assert " is ready on " in process.stdout.readline(), log.read_text()
        with ThreadPoolExecutor(NUM_REQUESTS) as clients:
            answers = [clients.submit(translate, port) for _ in range(NUM_REQUESTS)]
            time.sleep(0.8)
            under_way = sum(not answer.done() for answer in answers)
            all_of_it = family(process.pid)
            assert len(all_of_it) > 5
            targets = all_of_it if to_all else {process.pid}
            started = time.monotonic()
            for pid in targets:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            statuses = [answer.result() for answer in answers]
        code = process.wait(50)  # Ray's head under the hammer took 60 s to be missed
        ended_s = time.monotonic() - started
        while left := running(all_of_it):
            assert time.monotonic() < started + 60, f"still there: {left}"
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    report_figure(
        f"SIGTERM to {len(targets)} processes of babelephant serve ({proxy}): {NUM_REQUESTS} calls of {len(TEXTS)} texts, "
        f"{under_way} under way at the signal: {statuses}; exit {code} after {ended_s:.1f} s"
    )
    assert under_way > 0
    assert code == 0
    if not (to_all and proxy == "haproxy"):  # HAProxy takes SIGTERM as "drop everything": why the unit file says mixed
        assert statuses == [200] * NUM_REQUESTS


def translate(port: int) -> int | str:
    body = json.dumps({"source_lang": "en", "target_lang": "de", "texts": TEXTS}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/v1/translate", body, headers), timeout=90
        ) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError as error:
        return type(error).__name__
