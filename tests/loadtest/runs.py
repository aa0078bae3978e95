"""Runs against a stub, with everything that does not matter to a test filled in."""

from __future__ import annotations

from typing import Any

import numpy as np

from loadtest.arrivals import Schedule, draw_schedule, flat
from loadtest.execution import Execution
from loadtest.results import RunResult
from loadtest.sender import Monitor, SenderOptions
from loadtest.slo import ServiceLevel
from loadtest.summary import RunContext
from loadtest.workload import load_workload
from tests.loadtest.stub import StubService
from tests.loadtest.virtual_time import run_virtually

SINGLE = load_workload("single")


def at_times(times_s: list[float], warmup_s: float = 0.0) -> Schedule:
    """A schedule of exactly these times, one second longer than the last."""
    return Schedule(np.array(times_s), times_s[-1] + 1, warmup_s, "given", 1.0, 1)


def poisson(rate_per_s: float, duration_s: float, seed: int = 1) -> Schedule:
    return draw_schedule(flat(rate_per_s, duration_s), dispersion=1.0, seed=seed)


def context(url: str, schedule: Schedule, *, workload=SINGLE, **changes: Any) -> RunContext:
    defaults: dict[str, Any] = {
        "label": "test",
        "options": SenderOptions(timeout_s=5.0),
        "slo": ServiceLevel(latency_s=0.5, percentile=95),
        "confidence": 0.95,
        "max_lag_s": 0.01,
    }
    planned = workload.draw(len(schedule.times_s), 1)
    return RunContext(url=url, workload=workload.workload, schedule=schedule, planned=planned, **{**defaults, **changes})


def measure(stub: StubService, schedule: Schedule, monitors: tuple[Monitor, ...] = (), **changes: Any) -> RunResult:
    """One run in virtual time."""

    async def run() -> RunResult:
        async with stub.serving() as url:
            return await Execution(context(url, schedule, **changes), monitors).run()

    return run_virtually(run())
