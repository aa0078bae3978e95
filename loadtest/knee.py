"""The knee: the largest Poisson rate at which the SLO is shown to hold, by doubling and then bisecting the rate.

Every trial is a fresh run with its own seed, long enough that the statistics of loadtest.slo can show the promise; a
trial that certainly misses ends early, and one that stays undecided counts as not shown.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from loadtest.errors import LoadTestError
from loadtest.results import Trial

Purpose = Literal["search", "sweep"]
RunTrial = Callable[[float, int, Purpose], Awaitable[Trial]]  # rate per second, number of the trial, purpose


@dataclass(frozen=True, slots=True)
class KneeOptions:
    """Rates in requests/s. precision: stop when the failing rate is within this share of the passing one."""

    low_per_s: float = 1.0
    high_per_s: float = 1000.0
    precision: float = 0.05
    max_trials: int = 14
    sweep_points: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.low_per_s < self.high_per_s < math.inf:
            raise LoadTestError(f"need 0 < low < high; low is {self.low_per_s:g}, high is {self.high_per_s:g} requests/s")
        if not 0.001 <= self.precision <= 1:
            raise LoadTestError(f"precision is {self.precision:g}; choose 0.001 to 1 (0.05 is 5 %)")
        if self.max_trials < 1 or not 0 <= self.sweep_points <= 20:
            raise LoadTestError("max-trials is at least 1 and sweep is 0 to 20 points on each side")


@dataclass(slots=True)
class KneeSearch:
    """State of one search. passes_per_s / fails_per_s: the bracket so far."""

    options: KneeOptions
    run_trial: RunTrial
    trials: list[Trial] = field(default_factory=list)
    passes_per_s: float | None = None
    fails_per_s: float | None = None
    finished: str = "not finished"
    completed: bool = False

    async def run(self) -> None:
        """Search, then sweep around the knee; what is known so far stays in `self` for a caller that is interrupted."""
        while (rate := self._next_rate()) is not None:
            await self._try(rate)
        for rate in self._sweep_rates():
            self.trials.append(await self.run_trial(rate, len(self.trials), "sweep"))
        self.completed = True

    async def _try(self, rate: float) -> None:
        trial = await self._repeated_if_invalid(rate)
        if not _counts(trial):
            reasons = "; ".join(trial.run.invalid_because)
            raise LoadTestError(f"two trials at {rate:.4g} requests/s are not valid: {reasons}")
        if trial.verdict == "met":
            self.passes_per_s = rate
        else:
            self.fails_per_s = rate

    async def _repeated_if_invalid(self, rate: float) -> Trial:
        """The trial, or its repetition if something on the client's machine spoilt it; both are kept."""
        for _ in range(2):
            trial = await self.run_trial(rate, len(self.trials), "search")
            self.trials.append(trial)
            if _counts(trial):
                break
        return trial

    def _next_rate(self) -> float | None:
        low, high, options = self.passes_per_s, self.fails_per_s, self.options
        if high is not None and high <= options.low_per_s:
            self.finished = f"the SLO does not hold at {options.low_per_s:g} requests/s; try a lower --low or a looser SLO"
        elif low is not None and low >= options.high_per_s:
            self.finished = f"the SLO still holds at {options.high_per_s:g} requests/s; raise --high"
        elif low is not None and high is not None and high <= low * (1 + options.precision):
            self.finished = f"bracketed within {options.precision:.1%}"
        elif len(self.trials) >= options.max_trials:
            self.finished = f"stopped after {options.max_trials} trials; the bracket is wider than {options.precision:.1%}"
        elif low is None:
            return options.low_per_s
        else:
            return min(low * 2, options.high_per_s) if high is None else math.sqrt(low * high)
        return None

    def _sweep_rates(self) -> list[float]:
        """Points on both sides of the knee, from half of it to half above it, for the curve in the report."""
        if self.passes_per_s is None:
            return []
        points = self.options.sweep_points
        shares = [0.5 * step / points for step in range(1, points + 1)]
        below = [self.passes_per_s * (1 - share) for share in reversed(shares)]
        return below + [self.passes_per_s * (1 + share) for share in shares]


def _counts(trial: Trial) -> bool:
    """A miss with requests held back is the service's: it was so slow that the client reached its bound."""
    return trial.run.valid or (trial.verdict == "missed" and trial.run.client.num_held > 0)
