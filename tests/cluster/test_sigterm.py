"""SIGTERM to `babelephant serve` with requests under way: what was accepted is answered before it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.local_cluster import free_ports
from tests.cluster.fleet import REPOSITORY

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 8
TEXTS = ["The connection was lost; trying again in 30 seconds."] * 40


def test_sigterm_drains(tmp_path: Path, ray_environment: str, report_figure: Callable[[str], None]) -> None:
    (port,) = free_ports(1)
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port), "--timeout", "100"]
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
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            statuses = [answer.result() for answer in answers]
        code = process.wait(120)
        ended_s = time.monotonic() - started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    report_figure(
        f"SIGTERM to babelephant serve: {NUM_REQUESTS} requests of {len(TEXTS)} texts, {under_way} under way at the signal: "
        f"{statuses}; exit {code} after {ended_s:.1f} s"
    )
    assert under_way > 0
    assert statuses == [200] * NUM_REQUESTS
    assert code == 0


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
