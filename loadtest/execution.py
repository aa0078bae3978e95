"""One run from plan to result: draw the requests, send them, stop when told or when the verdict is certain, summarise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.outcomes import Recording
from loadtest.results import RunResult
from loadtest.sender import Monitor, OpenLoopSender
from loadtest.sender_processes import SenderProcesses, processes_needed
from loadtest.slo import ServiceLevel
from loadtest.summary import RunContext, RunSummary
from loadtest.target import Target


@dataclass(slots=True)
class VerdictDetector:
    """A monitor that stops a run once its counts decide about the SLO (early stopping).

    A miss stops it at any time. That the SLO is met may end it only at the looks_s (seconds from the start, rising):
    `confidence` is meant per look, so a caller who looks k times divides the error it allows by k.
    """

    slo: ServiceLevel
    confidence: float
    warmup_s: float
    looks_s: Sequence[float]
    decided: bool = False
    _num_looks_done: int = 0

    def __call__(self, recording: Recording, now_s: float) -> bool:
        """True when certain."""
        num_good, num_bad = recording.good_and_bad(self.slo.latency_s, now_s, self.warmup_s)
        num_due = sum(look_s <= now_s for look_s in self.looks_s)
        may_pass, self._num_looks_done = num_due > self._num_looks_done, num_due
        verdict = self.slo.verdict(num_good, num_bad, self.confidence)
        self.decided = self.decided or verdict == "missed" or (may_pass and verdict == "met")
        return self.decided


class Execution:
    """One run; `stop()` from a signal handler ends it early and marks the result invalid."""

    def __init__(
        self, context: RunContext, monitors: Sequence[Monitor] = (), *, detector: VerdictDetector | None = None
    ) -> None:
        self._context = context
        self._detector = detector
        chosen: list[Monitor] = [*monitors, detector] if detector else [*monitors]
        self._sender = _sender(context, chosen)

    @property
    def decided_early(self) -> bool:
        """The sending stopped because the verdict was certain."""
        return self._detector is not None and self._detector.decided

    def stop(self) -> None:
        """Send nothing more; answers under way are awaited."""
        self._sender.stop()

    async def run(self) -> RunResult:
        """Send, wait, summarise."""
        recording = await self._sender.run()
        never_sent = recording.never_sent()
        cut_short_s = float(recording.intended_s[never_sent[0][0]]) if never_sent else None
        summary = RunSummary(
            self._context,
            recording,
            cpu_fraction=self._sender.cpu_fraction,
            cut_short_s=cut_short_s,
            decided=self.decided_early,
            faults=self._sender.faults,
            num_processes=self._sender.num_processes,
        )
        return summary.result()


def _sender(context: RunContext, monitors: Sequence[Monitor]) -> OpenLoopSender | SenderProcesses:
    target, times_s, options = Target(context.url), context.schedule.times_s, context.options
    num_processes = min(options.num_processes or processes_needed(times_s), options.max_in_flight, len(times_s))
    if num_processes == 1:
        return OpenLoopSender(target, Recording.empty(times_s), context.planned, options, monitors)
    return SenderProcesses(target, times_s, context.planned, options, num_processes, monitors)
