"""Decisions as JSON lines: settings first, then every reading with the decision it led to.

A policy's state is nothing but its readings (the capacities it counted with are among them), so the file is both the proof
(`verify` decides again, bit for bit) and the memory: a new controller reads it and goes on where the old one stopped. About
300 bytes and 70 a pool for each decision.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from app.autoscaling.feed import Reading
from app.autoscaling.settings import AutoscalingSettings
from app.cost.guards import FleetDecision, Limits
from app.cost.replay import Observation

VERSION = 2
_LOCK_WAIT_S = 30.0


class DecisionLogError(ValueError):
    """A file that is no decision log, or one that another process writes; the message says what to do."""


def to_record(reading: Reading, decision: FleetDecision) -> dict[str, Any]:
    """One line; floats keep every bit in JSON."""
    seen, limits = reading.seen, reading.limits
    return {
        "time_s": seen.time_s,
        "offered": seen.offered.tolist(),
        "backlog": seen.backlog.tolist(),
        "ready": seen.ready.tolist(),
        "pending": seen.pending.tolist(),
        "minimum": limits.minimum.tolist(),
        "maximum": limits.maximum.tolist(),
        "known": limits.known.tolist(),
        "capacity": reading.capacity.tolist(),
        "target": decision.target.tolist(),
        "wanted": decision.wanted.tolist(),
        "forecast": decision.forecast.tolist(),
        "reason": list(decision.reason),
    }


def to_reading(record: dict[str, Any]) -> Reading:
    """The reading of a line."""

    def counts(key: str) -> Any:
        return np.array(record[key], np.int64)

    backlog = np.array(record["backlog"], np.float64)
    seen = Observation(
        float(record["time_s"]), counts("offered"), np.zeros(len(backlog)), backlog, counts("ready"), counts("pending")
    )
    limits = Limits(counts("minimum"), counts("maximum"), np.array(record["known"], bool))
    return Reading(seen, limits, np.array(record["capacity"], np.float64))


def read_log(path: Path) -> tuple[AutoscalingSettings, Iterator[dict[str, Any]]]:
    """Settings and lines. A last line that was cut off, as by a crash, is left out. Raises DecisionLogError, OSError."""
    lines = _whole_lines(path)
    try:
        header = json.loads(next(lines))
        if header["babelephant_decisions"] != VERSION:
            raise DecisionLogError(f"{path} has version {header['babelephant_decisions']}; this program reads {VERSION}")
        settings = AutoscalingSettings.model_validate(header["settings"])
    except (StopIteration, TypeError, KeyError, json.JSONDecodeError) as error:
        raise DecisionLogError(f"{path} is no decision log; log_path in the Serve YAML names it") from error
    return settings, map(json.loads, lines)


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """num_decisions decided again; num_different of them came out otherwise, the first at line `first_line` (from 1)."""

    num_decisions: int
    num_different: int
    first_line: int | None
    first_difference: str


def verify(path: Path) -> Verdict:
    """Decide everything in a log again with the code at hand, and compare every bit."""
    settings, records = read_log(path)
    policy = settings.policy()
    count = different = 0
    first_line, first = None, ""
    for count, record in enumerate(records, 1):
        reading = to_reading(record)
        again = to_record(reading, policy.decide_on(reading))
        if again != record:
            different += 1
            if first_line is None:
                first_line = count + 1
                keys = [key for key in again if again[key] != record.get(key)]
                first = ", ".join(f"{key}: {record.get(key)} logged, {again[key]} now" for key in keys)
    return Verdict(count, different, first_line, first)


class DecisionLog:
    """Appends to a file that one planner at a time holds. A log with other settings is kept aside under a new name."""

    def __init__(self, path: Path, settings: AutoscalingSettings) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._settings = settings.model_dump(mode="json", exclude={"log_path", "lengths_path"})
        self._path = path
        self._file = path.open("a+b")
        self._lock()
        self.resumable = self._is_ours()
        if not self.resumable:
            self._start_anew()

    def _lock(self) -> None:
        """The planner before this one may still be writing its last line."""
        give_up = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > give_up:
                    self._file.close()
                    raise DecisionLogError(
                        f"{self._path} is being written by another process; give each its own log_path"
                    ) from None
                time.sleep(0.05)

    def _is_ours(self) -> bool:
        self._file.seek(0)
        try:
            header = json.loads(self._file.readline())
            return bool(header["babelephant_decisions"] == VERSION and header["settings"] == self._settings)
        except (TypeError, KeyError, ValueError):
            return False

    def _start_anew(self) -> None:
        if self._path.stat().st_size:
            number = next(n for n in range(1, 1 << 20) if not self._path.with_name(f"{self._path.name}.{n}").exists())
            self._path.rename(self._path.with_name(f"{self._path.name}.{number}"))
            self._file.close()
            self._file = self._path.open("a+b")
            self._lock()
        self._write({"babelephant_decisions": VERSION, "settings": self._settings})

    def past(self, stop: Callable[[], bool]) -> Iterator[Reading]:
        """Readings so far, oldest first, until `stop()`; a line that was cut off is removed from the file."""
        self._file.seek(0)
        self._file.readline()
        while not stop():
            begin = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.truncate(begin)
                return
            yield to_reading(json.loads(line))

    def append(self, reading: Reading, decision: FleetDecision) -> None:
        """One decision, on disk (not flushed to the platter) when this returns."""
        self._write(to_record(reading, decision))

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let another planner have the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
