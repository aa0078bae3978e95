"""A real `babelephant serve`, and what can be seen of it from outside: answers, status, metrics, spans, processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.local_cluster import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
USD_PER_HOUR = 36.0


class Served:
    """A running `babelephant serve`; started_s: on time.monotonic's clock."""

    def __init__(self, process: subprocess.Popen[str], started_s: float, url: str, ready_line: str, logs: Path) -> None:
        self.process = process
        self.started_s = started_s
        self.url = url
        self.ready_line = ready_line
        self.logs = logs

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=180) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def translate(self, source: str, target: str, *texts: str, **options: Any) -> dict[str, Any]:
        body = {"source_lang": source, "target_lang": target, "texts": texts, **options}
        status, _, answer = self.request("/v1/translate", body)
        assert status == 200, answer
        return json.loads(answer)


@contextmanager
def running_service(directory: Path) -> Iterator[Served]:
    """`babelephant serve` on a Ray of its own in a session of its own, with JSON logs, a price and tracing."""
    raw = yaml.safe_load((REPOSITORY / "cluster_configs/serve/two-pools.yaml").read_text())
    args = raw["applications"][0]["args"]
    args["pools"]["main"]["precision"] = "fp32"  # exact: batch mates cannot change a rounding
    args["http"] = {"max_body_bytes": 100_000}
    raw["applications"][0]["deployments"][1]["user_config"]["usd_per_hour"] = USD_PER_HOUR  # of the pool `main`
    raw["logging_config"] = {"encoding": "JSON", "enable_access_log": True}
    raw["tracing_config"] = {"enabled": True, "sampling_ratio": 0.0}  # spans of requests with a sampled traceparent
    ray_folder = Path(tempfile.mkdtemp(prefix="b"))  # short: Ray puts sockets below it
    config = directory / "serve.yaml"
    config.write_text(yaml.safe_dump(raw))
    (port,) = free_ports(1)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "BABELEPHANT_"))}
    environment |= {"PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(ray_folder)}
    command = [sys.executable, "-m", "app.cli", "serve", str(config), "--port", str(port), "--timeout", "600"]
    started_s = time.monotonic()
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
    try:
        assert process.stdout is not None
        ready_line = next((line for line in iter(process.stdout.readline, "") if " is ready on " in line), None)
        assert ready_line is not None, (directory / "log").read_text()
        (session,) = [path for path in (ray_folder / "ray").glob("session_2*") if path.is_dir()]
        yield Served(process, started_s, f"http://127.0.0.1:{port}", ready_line, session / "logs")
    finally:
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(120)
        finally:
            for pid in session_processes(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(ray_folder, ignore_errors=True)


def session_processes(group: int) -> set[int]:
    """Processes of a session that are alive; the server is started in a session of its own."""
    pids = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == group and fields[0] != "Z":
            pids.add(int(stat.parent.name))
    return pids


def replicas(served: Served, pool: str) -> list[dict[str, Any]]:
    """What /v1/status tells of those that answered in time."""
    return next(entry["replicas"] for entry in json.loads(served.request("/v1/status")[2])["pools"] if entry["name"] == pool)


class Metrics:
    """One look at /metrics, where processes, and the metrics of one, arrive one after the other."""

    def __init__(self, served: Served) -> None:
        status, _, page = served.request("/metrics")  # not 200: no exporter answered in time
        families = text_string_to_metric_families(page.decode() if status == 200 else "")
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """Sum of the values with these labels; 0 where there is none, as of a level that nobody has set for a while."""
        named = [sample for sample in self.samples if sample.name == f"ray_babelephant_{name}"]
        return sum(sample.value for sample in named if labels.items() <= sample.labels.items())


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "timed out"
        time.sleep(0.05)


def wait_for_metrics(served: Served, check: Callable[[Metrics], None], timeout_s: float = 120.0) -> None:
    """Look until the assertions of `check` hold."""
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            return check(Metrics(served))
        except AssertionError:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.05)


def spans(served: Served, trace_id: str | None = None) -> list[dict[str, Any]]:
    """What Serve's own file exporter wrote: JSON documents one after the other, the last perhaps not to its end yet."""
    found, decoder = [], json.JSONDecoder()
    for path in (served.logs / "serve/spans").glob("*"):
        text = path.read_text().strip()
        with suppress(json.JSONDecodeError):
            while text:
                span, end = decoder.raw_decode(text)
                found.append(span)
                text = text[end:].strip()
    return [span for span in found if trace_id in (None, span["context"]["trace_id"].removeprefix("0x"))]
