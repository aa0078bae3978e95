"""From the record of a run to its result: counts, rates, percentiles, goodput, validity, cost."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
import numpy.typing as npt

from loadtest.arrivals import Floats, Schedule
from loadtest.latency import summarise
from loadtest.outcomes import Ints, Outcome, Recording
from loadtest.price import Price
from loadtest.results import (
    ClientRecord,
    Counts,
    LengthBin,
    PairRecord,
    Rates,
    RunResult,
    ScheduleRecord,
    Window,
)
from loadtest.sender import SenderOptions
from loadtest.slo import ServiceLevel
from loadtest.workload import PlannedRequest, Workload

_MAX_WINDOWS = 60
_MAX_HELD_FRACTION = 0.01
_MAX_CPU_FRACTION = 0.7
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a run was: everything about it that the record of its requests does not say."""

    url: str
    label: str
    workload: Workload
    schedule: Schedule
    planned: Sequence[PlannedRequest]
    options: SenderOptions
    slo: ServiceLevel
    confidence: float
    max_lag_s: float
    price: Price | None = None


class RunSummary:
    """Columns of the measured requests of one run, and everything computed from them."""

    def __init__(
        self,
        context: RunContext,
        recording: Recording,
        *,
        cpu_fraction: float,
        cut_short_s: float | None = None,
        decided: bool = False,
        faults: Sequence[str] = (),
        num_processes: int = 1,
    ) -> None:
        """cut_short_s: when sending stopped before the end of the schedule, seconds from the start.

        decided: it stopped because the verdict was certain, which does not make the run invalid. faults: of the client, each
        of which does.
        """
        self._context = context
        self._recording = recording
        self._cpu_fraction = cpu_fraction
        self._faults = faults
        self._num_processes = num_processes
        self._interrupted = cut_short_s is not None and not decided
        self._warmup_s = context.schedule.warmup_s
        self._end_s = context.schedule.duration_s if cut_short_s is None else cut_short_s
        self._measured_s = max(self._end_s - self._warmup_s, 1e-9)
        chosen: Ints = np.flatnonzero(recording.begun & (recording.intended_s >= self._warmup_s))
        self._indices = chosen
        self._intended: Floats = recording.intended_s[chosen]
        self._latency: Floats = recording.latency_s()[chosen]
        self._outcome: Ints = recording.outcome[chosen]
        self._ok: Mask = self._outcome == Outcome.OK
        self._good: Mask = self._ok & (self._latency <= context.slo.latency_s)
        self._source_chars: Ints = np.array([context.planned[i].source_chars for i in chosen.tolist()], np.int64)
        self._pair: Ints = np.array([context.planned[i].pair_index for i in chosen.tolist()], np.int64)

    def result(self) -> RunResult:
        """The whole result."""
        context, recording = self._context, self._recording
        num_good = int(self._good.sum())
        client, rates = self._client(), self._rates()
        invalid_because = self._invalid_because(client)
        return RunResult(
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            label=context.label,
            url=context.url,
            workload=context.workload.name,
            schedule=self._schedule(),
            slo=context.slo,
            confidence=context.confidence,
            slo_verdict=context.slo.verdict(num_good, len(self._indices) - num_good, context.confidence),
            valid=not invalid_because,
            invalid_because=invalid_because,
            warnings=self._warnings(),
            counts=self._counts(),
            statuses=self._statuses(),
            rates=rates,
            latency=summarise(self._latency[self._ok]),
            server_timing={
                name: summary
                for name, column in sorted(recording.server_s.items())
                if (summary := summarise(_finite(column[self._indices]))) is not None
            },
            overhead=summarise(_finite(self._overhead())),
            p99_drift=self._p99_drift(),
            by_pair=self._by_pair(),
            windows=self._windows(),
            source_lengths=self._source_lengths(),
            distinct_requests_fraction=len({context.planned[i].body for i in self._indices.tolist()})
            / max(len(self._indices), 1),
            never_sent=self._recording.never_sent(),
            client=client,
            cost=None if context.price is None else context.price.cost(rates),
        )

    def _schedule(self) -> ScheduleRecord:
        schedule = self._context.schedule
        dispersion = None if math.isnan(schedule.dispersion) else schedule.dispersion
        return ScheduleRecord(
            arrivals=schedule.arrivals,
            dispersion=dispersion,
            seed=schedule.seed,
            duration_s=schedule.duration_s,
            warmup_s=schedule.warmup_s,
            num_scheduled=len(schedule.times_s),
        )

    def _client(self) -> ClientRecord:
        lag = (self._recording.sent_s - self._recording.intended_s)[self._indices]
        return ClientRecord(
            send_lag=summarise(_finite(lag)),
            max_lag_s=self._context.max_lag_s,
            cpu_fraction=self._cpu_fraction,
            num_held=int(self._recording.held[self._indices].sum()),
            max_in_flight=self._context.options.max_in_flight,
            num_processes=self._num_processes,
            timeout_s=self._context.options.timeout_s,
            num_cpus=os.cpu_count() or 1,
            load_average=os.getloadavg()[0],
            versions={"python": platform.python_version(), "aiohttp": aiohttp.__version__, "numpy": np.__version__},
        )

    def _invalid_because(self, client: ClientRecord) -> list[str]:
        reasons = [*self._faults]
        if not len(self._indices):
            reasons.append("no request was sent after the warm-up")
        if client.num_held > _MAX_HELD_FRACTION * max(len(self._indices), 1):
            reasons.append(
                f"{client.num_held} requests waited because {client.max_in_flight} were out: the service saw less than the "
                "schedule; raise --max-in-flight, or the rate is far beyond the service"
            )
        elif client.send_lag is not None and client.send_lag.p99_s > client.max_lag_s:
            reasons.append(
                f"send lag p99 {client.send_lag.p99_s * 1000:.1f} ms exceeds {client.max_lag_s * 1000:g} ms: this client or "
                "its machine is too slow for the rate; use more --processes, a quieter machine, a lower rate, or accept "
                "more with --max-lag-ms"
            )
        if self._interrupted:
            reasons.append(f"stopped after {self._end_s:.1f} of {self._context.schedule.duration_s:g} s")
        return reasons

    def _warnings(self) -> list[str]:
        found = []
        if self._cpu_fraction > _MAX_CPU_FRACTION:
            found.append(f"the client used {self._cpu_fraction:.0%} of a core: latencies may include its own work")
        codes = self._outcome
        if int((codes == Outcome.CLIENT_ERROR).sum()):
            found.append("some requests were answered 4xx: does the service know the workload's languages and lengths?")
        unsent = int(np.isnan(self._recording.sent_s[self._indices]).sum())
        if unsent:
            found.append(f"{unsent} requests were never written to a connection; they count from their intended time")
        return found

    def _counts(self) -> Counts:
        by_outcome = {outcome.name.lower(): int((self._outcome == outcome).sum()) for outcome in Outcome}
        retried = int(self._recording.retried[self._indices].sum())
        return Counts(sent=len(self._indices), retried=retried, **by_outcome)

    def _statuses(self) -> dict[str, int]:
        counted = Counter(self._recording.status[self._indices].tolist())
        return {str(status) if status else "none": count for status, count in sorted(counted.items())}

    def _rates(self) -> Rates:
        done = self._recording.done_s[self._indices]
        in_time = self._ok & (done <= self._end_s)
        target_chars = self._recording.target_chars[self._indices]

        def per_second(amount: float) -> float:
            return float(amount) / self._measured_s

        return Rates(
            offered_per_s=per_second(len(self._indices)),
            completed_per_s=per_second(in_time.sum()),
            goodput_per_s=per_second(self._good.sum()),
            good_fraction=float(self._good.mean()) if len(self._good) else 0.0,
            source_chars_per_s=per_second(self._source_chars[in_time].sum()),
            good_source_chars_per_s=per_second(self._source_chars[self._good].sum()),
            target_chars_per_s=per_second(target_chars[in_time].sum()),
        )

    def _overhead(self) -> Floats:
        """Seconds per answered request outside the service's own total: network, proxy, parsing, this client."""
        total = self._recording.server_s.get("total")
        if total is None:
            return np.array([])
        wire = (self._recording.done_s - self._recording.sent_s)[self._indices]
        overhead: Floats = (wire - total[self._indices])[self._ok]
        return overhead

    def _p99_drift(self) -> float | None:
        third = self._measured_s / 3
        first = self._latency[self._ok & (self._intended < self._warmup_s + third)]
        last = self._latency[self._ok & (self._intended >= self._end_s - third)]
        if not len(first) or not len(last):
            return None
        return float(np.percentile(last, 99) / np.percentile(first, 99))

    def _by_pair(self) -> list[PairRecord]:
        records = []
        for index, pair in enumerate(self._context.workload.pairs):
            mine = self._pair == index
            records.append(
                PairRecord(
                    pair=pair.name,
                    sent=int(mine.sum()),
                    ok=int((mine & self._ok).sum()),
                    good=int((mine & self._good).sum()),
                    source_chars=int(self._source_chars[mine].sum()),
                    latency=summarise(self._latency[mine & self._ok]),
                )
            )
        return records

    def _windows(self) -> list[Window]:
        length = max(1.0, math.ceil(self._measured_s / _MAX_WINDOWS))
        starts = np.arange(self._warmup_s, self._end_s, length)
        return [self._window(float(start), min(length, self._end_s - float(start))) for start in starts]

    def _window(self, start: float, length: float) -> Window:
        inside = (self._intended >= start) & (self._intended < start + length)
        answered = self._latency[inside & self._ok]
        p50_s, p99_s = np.percentile(answered, (50, 99), method="inverted_cdf") if len(answered) else (None, None)
        offered, good = int(inside.sum()), int((inside & self._good).sum())
        slow = int((inside & self._ok & ~self._good).sum())
        refused = int((inside & (self._outcome == Outcome.REFUSED)).sum())
        return Window(
            start_s=start,
            length_s=length,
            offered=offered,
            good=good,
            slow=slow,
            refused=refused,
            failed=offered - good - slow - refused,
            p50_s=p50_s,
            p99_s=p99_s,
        )

    def _source_lengths(self) -> list[LengthBin]:
        if not len(self._source_chars):
            return []
        edges = np.unique(np.geomspace(1, self._source_chars.max() + 1, 17).round().astype(np.int64))
        counts, _ = np.histogram(self._source_chars, bins=edges)
        pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        return [LengthBin(low=low, high=high, count=count) for low, high, count in pairs]


def _finite(values: Floats) -> Floats:
    finite: Floats = values[np.isfinite(values)]
    return finite
