"""Open-loop load from our own sender, in a process of its own, and what became of the requests."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.fleet import REPOSITORY

# Both pools get traffic: `europe` translates between English and German, everything else goes to `world`.
_WORKLOAD = {
    "name": "chaos",
    "description": "One short sentence a request, half of them for either pool",
    "texts": str(REPOSITORY / "loadtest/workloads/sentences.yaml"),
    "slo": {"percentile": 90, "latency_s": 1.5},
    "texts_per_request": {1: 1},
    "characters": {"median": 25, "sigma": 0.4, "min": 4, "max": 60},
    "pairs": [
        {"source_lang": "eng_Latn", "target_lang": "deu_Latn", "weight": 1},
        {"source_lang": "deu_Latn", "target_lang": "eng_Latn", "weight": 1},
        {"source_lang": "eng_Latn", "target_lang": "rus_Cyrl", "weight": 1},
        {"source_lang": "eng_Latn", "target_lang": "jpn_Jpan", "weight": 1},
    ],
}
_TIMEOUT_S = 60.0
_LEAD_S = 3.0  # Python and the first requests


@dataclass
class Tally:
    """Counts of one run. lost: 5xx other than 503 with Retry-After, no answer, connection error, broken answer."""

    name: str
    rate_per_s: float
    duration_s: float
    result: dict[str, Any] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> int:
        try:
            return int(self.result["counts"][name])
        except KeyError:
            raise AttributeError(name) from None

    @property
    def lost(self) -> int:
        return sum(self.result["counts"][key] for key in ("server_error", "timeout", "connection", "malformed", "pending"))

    def event(self, text: str) -> None:
        self.events.append(text)

    def __str__(self) -> str:
        latency = self.result["latency"] or {}
        shown = ", ".join(f"{key[:-2]} {latency[key]:.2f}" for key in ("p50_s", "p99_s", "max_s") if key in latency)
        return (
            f"{self.name}: {self.duration_s:g} s at {self.rate_per_s:.3g}/s: sent {self.sent}, answered {self.ok}, "
            f"refused {self.refused}, lost {self.lost}, 4xx {self.client_error}; latency s {shown}; statuses "
            f"{self.result['statuses']}; client kept its schedule: {self.result['valid']}; {'; '.join(self.events)}"
        )


def nothing_lost(tally: Tally, report: Callable[[str], None]) -> None:
    """The claim of every chaos test: the load was sent, and every request was answered or refused cleanly."""
    report(str(tally))
    assert tally.sent > 0.5 * tally.duration_s * tally.rate_per_s
    assert (tally.lost, tally.client_error) == (0, 0), str(tally)


class Traffic:
    """Runs `python -m loadtest` against one service; results stay in `directory`."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url
        self._directory = directory
        self._workload = directory / "chaos.yaml"
        self._workload.write_text(yaml.safe_dump(_WORKLOAD), encoding="utf-8")

    def _command(self, command: str, output: Path, **options: object) -> list[str]:
        chosen = {"url": self._url, "workload": self._workload, "output": output, "max_lag_ms": 250, **options}
        flags = [str(part) for key, value in chosen.items() for part in (f"--{key.replace('_', '-')}", value)]
        return [sys.executable, "-m", "loadtest", command, "--no-progress", *flags]

    def knee(self) -> float:
        """Largest rate of a short search (p90 within 1.5 s, confidence 0.8), requests per second."""
        output = self._directory / "knee.json"
        search = {"low": 4, "high": 64, "precision": 0.35, "max_trials": 6, "trial_duration": 8, "max_trial_duration": 12}
        command = self._command("knee", output, confidence=0.8, max_minutes=3, **search)
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
        knee = json.loads(output.read_text())["knee_per_s"] if output.exists() else None
        if knee is None:
            raise AssertionError(f"the knee search found no rate: {run.stdout}{run.stderr}")
        return float(knee)

    @contextmanager
    def load(self, name: str, rate_per_s: float, duration_s: float) -> Iterator[Tally]:
        """Load while the block runs, and on until the duration is over; then the tally has its result."""
        tally = Tally(name, rate_per_s, duration_s)
        output = self._directory / f"{name.replace(' ', '-')}.json"
        run = {"rate": f"{rate_per_s:.4f}", "duration": duration_s, "timeout": _TIMEOUT_S}
        command = self._command("run", output, **run)
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=printed.extend, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            time.sleep(_LEAD_S)
            yield tally
            process.wait(duration_s + _TIMEOUT_S + 60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            reader.join(5)
        if not output.exists():
            raise AssertionError(f"the sender wrote no result: {''.join(printed)}")
        tally.result = json.loads(output.read_text())
