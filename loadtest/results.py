"""What a run or a knee search leaves behind: JSON files that say how they were made, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loadtest.errors import LoadTestError
from loadtest.latency import LatencySummary
from loadtest.slo import ServiceLevel, Verdict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class ScheduleRecord(_Record):
    """How the send times were made; dispersion and seed are null for a trace."""

    arrivals: str
    dispersion: float | None
    seed: int | None
    duration_s: float
    warmup_s: float
    num_scheduled: int


class ClientRecord(_Record):
    """Proof that the client was not the bottleneck. send_lag: actual minus intended send, every measured request.

    num_held: requests that waited because max_in_flight others were out. num_processes: that sent. cpu_fraction: of one
    core, of the busiest of them.
    """

    send_lag: LatencySummary | None
    max_lag_s: float
    cpu_fraction: float
    num_held: int
    max_in_flight: int
    num_processes: int = 1
    timeout_s: float
    num_cpus: int
    load_average: float
    versions: dict[str, str]


class Counts(_Record):
    """Measured requests (after the warm-up) by how they ended; `sent` is their sum."""

    sent: int
    ok: int
    refused: int
    client_error: int
    server_error: int
    timeout: int
    connection: int
    malformed: int
    pending: int
    retried: int

    @property
    def lost(self) -> int:
        """Neither answered nor cleanly refused."""
        return self.server_error + self.timeout + self.connection + self.malformed


class Rates(_Record):
    """Per second of the measured time. completed: answered 200 within it; goodput: correct and within the SLO's latency."""

    offered_per_s: float
    completed_per_s: float
    goodput_per_s: float
    good_fraction: float
    source_chars_per_s: float
    good_source_chars_per_s: float
    target_chars_per_s: float


class PairRecord(_Record):
    """One language pair; latency over its answered requests."""

    pair: str
    sent: int
    ok: int
    good: int
    source_chars: int
    latency: LatencySummary | None


class Window(_Record):
    """A slice of the run by intended send time; percentiles over answered requests, null without any."""

    start_s: float
    length_s: float
    offered: int
    good: int
    slow: int
    refused: int
    failed: int
    p50_s: float | None
    p99_s: float | None


class LengthBin(_Record):
    """Requests whose source has low <= characters < high."""

    low: int
    high: int
    count: int


class Cost(_Record):
    """USD per million source characters that were answered within the SLO, and of all that were answered; null for none."""

    usd_per_replica_hour: float
    num_replicas: int
    usd_per_million_good_chars: float | None
    usd_per_million_chars: float | None


class RunResult(_Record):
    """One run. Latencies are of answered requests, from the intended send; everything else counts as a violation.

    valid: the client kept the schedule. slo_verdict: what the counts show at `confidence`. overhead: answered requests'
    time on the wire beyond the service's own `total`. p99_drift: p99 of the last third of the run over p99 of the
    first. never_sent: first and last number (from 0, in the order of the schedule) of requests whose turn did not come.
    """

    format: Literal["babelephant-loadtest-run/1"] = "babelephant-loadtest-run/1"
    created_at: str
    label: str
    url: str
    workload: str
    schedule: ScheduleRecord
    slo: ServiceLevel
    confidence: float
    slo_verdict: Verdict
    valid: bool
    invalid_because: list[str]
    warnings: list[str]
    counts: Counts
    statuses: dict[str, int]
    rates: Rates
    latency: LatencySummary | None
    server_timing: dict[str, LatencySummary]
    overhead: LatencySummary | None
    p99_drift: float | None
    by_pair: list[PairRecord]
    windows: list[Window]
    source_lengths: list[LengthBin]
    distinct_requests_fraction: float
    never_sent: list[tuple[int, int]] = []
    client: ClientRecord
    cost: Cost | None


class Trial(_Record):
    """One rate of a knee search. stopped_early: the verdict was certain before the end."""

    rate_per_s: float
    purpose: Literal["search", "sweep"]
    verdict: Verdict
    stopped_early: bool
    run: RunResult


class KneeResult(_Record):
    """The largest Poisson rate whose trial showed the SLO (null: none did) and the smallest that did not."""

    format: Literal["babelephant-loadtest-knee/1"] = "babelephant-loadtest-knee/1"
    created_at: str
    label: str
    slo: ServiceLevel
    confidence: float
    knee_per_s: float | None
    fails_at_per_s: float | None
    finished: str
    trials: list[Trial]

    @property
    def best(self) -> RunResult | None:
        """The run at the knee."""
        return next((trial.run for trial in self.trials if trial.rate_per_s == self.knee_per_s), None)


class LevelResult(_Record):
    """Some clients at once. latency: of requests answered well, from their send; counts: of requests that ended in time,
    and of those that ended badly later.

    requests_per_s: answered well. gpu_busy: share in 0..1 of the time in which any kernel ran, by index of the GPU, empty
    where this machine cannot tell. cpu_fraction: of one core, of the busiest client process.
    """

    num_clients: int
    num_processes: int
    duration_s: float
    counts: Counts
    requests_per_s: float
    source_chars_per_s: float
    latency: LatencySummary | None
    gpu_busy: dict[str, float]
    cpu_fraction: float


class ClosedLoopResult(_Record):
    """What a service does at one number of clients after another (loadtest.closed_loop)."""

    format: Literal["babelephant-loadtest-closed/1"] = "babelephant-loadtest-closed/1"
    created_at: str
    url: str
    workload: str
    seed: int
    warmup_s: float
    levels: list[LevelResult]


Result = Annotated[RunResult | KneeResult, Field(discriminator="format")]
_RESULT: TypeAdapter[RunResult | KneeResult] = TypeAdapter(Result)


def save_result(result: RunResult | KneeResult | ClosedLoopResult, path: Path) -> None:
    """Write the JSON file whole or not at all."""
    write_atomically(path, result.model_dump_json(indent=1))


def load_result(path: Path) -> RunResult | KneeResult:
    """Read a result; LoadTestError names the file and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"cannot read {path}: {error}") from error
    try:
        return _RESULT.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise LoadTestError(f"{path} is not a result of `python -m loadtest`: {place}: {first['msg']}") from error


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one; LoadTestError if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise LoadTestError(f"cannot write {path}: {error}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
