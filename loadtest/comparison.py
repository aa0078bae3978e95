"""Two sets of runs side by side: medians over each set, difference in percent."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.errors import LoadTestError
from loadtest.results import RunResult

Figure = Callable[[RunResult], float | None]


def _percentile(name: str) -> Figure:
    return lambda run: None if run.latency is None else float(getattr(run.latency, name)) * 1000


FIGURES: dict[str, Figure] = {
    "offered/s": lambda run: run.rates.offered_per_s,
    "completed/s": lambda run: run.rates.completed_per_s,
    "goodput/s": lambda run: run.rates.goodput_per_s,
    "good %": lambda run: run.rates.good_fraction * 100,
    "p50 ms": _percentile("p50_s"),
    "p90 ms": _percentile("p90_s"),
    "p95 ms": _percentile("p95_s"),
    "p99 ms": _percentile("p99_s"),
    "p99.9 ms": _percentile("p99_9_s"),
    "refused": lambda run: run.counts.refused,
    "lost": lambda run: run.counts.lost,
    "source chars/s": lambda run: run.rates.source_chars_per_s,
    "USD/1M good chars": lambda run: run.cost.usd_per_million_good_chars if run.cost else None,
    "send lag p99 ms": lambda run: run.client.send_lag.p99_s * 1000 if run.client.send_lag else None,
}


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """Medians of one figure; None where no run of the set has it."""

    name: str
    base: float | None
    new: float | None

    @property
    def change(self) -> float | None:
        """(new - base) / base; None without a base to divide by."""
        if self.base is None or self.new is None or self.base == 0:
            return None
        return self.new / self.base - 1


def compare_runs(base: Sequence[RunResult], new: Sequence[RunResult]) -> list[ComparedFigure]:
    """Every figure; LoadTestError when the runs are not of the same workload and SLO."""
    kinds = {(run.workload, str(run.slo)) for run in (*base, *new)}
    if len(kinds) > 1:
        listed = "; ".join(f"workload {workload}, SLO {slo}" for workload, slo in sorted(kinds))
        raise LoadTestError(f"these runs measure different things ({listed}); compare runs of one workload and SLO")
    return [ComparedFigure(name, _median(figure, base), _median(figure, new)) for name, figure in FIGURES.items()]


def _median(figure: Figure, runs: Sequence[RunResult]) -> float | None:
    values = [value for run in runs if (value := figure(run)) is not None]
    return statistics.median(values) if values else None
