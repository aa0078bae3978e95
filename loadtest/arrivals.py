"""When requests are sent: a schedule fixed before the run, a pure function of its description and a seed.

A rate profile (piecewise linear, jumps allowed) says how many arrivals are due; a stationary renewal process of rate 1
says how irregular they are. The schedule is that process with its clock bent by the profile: an event of the unit
process at u happens at the time t with L(t) = u, L being the integral of the rate (time-rescaling theorem of point
processes). So every shape (flat, ramp, steps, soak) comes with every irregularity (constant, Poisson, Gamma).
"""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.errors import LoadTestError

Floats = npt.NDArray[np.float64]

MAX_DISPERSION = 200.0  # the burstiest clients seen in published traces have inter-arrival CV 14


@dataclass(frozen=True, slots=True)
class RateProfile:
    """Offered rate over time: rates_per_s[i] at times_s[i], straight lines between; a repeated time is a jump."""

    times_s: tuple[float, ...]
    rates_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times_s) != len(self.rates_per_s) or len(self.times_s) < 2:
            raise LoadTestError("a rate profile needs at least two times and as many rates")
        if not all(map(math.isfinite, (*self.times_s, *self.rates_per_s))):
            raise LoadTestError("a rate or time is not a finite number; rates are requests per second, times are seconds")
        if self.times_s[0] != 0 or any(b < a for a, b in itertools.pairwise(self.times_s)):
            raise LoadTestError("times of a rate profile start at 0 and never go back")
        if self.duration_s <= 0:
            raise LoadTestError(f"the duration is {self.duration_s:g} s; it must be positive")
        if min(self.rates_per_s) < 0 or self.expected_count <= 0:
            raise LoadTestError("rates cannot be negative, and some rate must be above 0 requests per second")

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.times_s[-1]

    @property
    def expected_count(self) -> float:
        """Mean number of arrivals: the integral of the rate."""
        return float(self._cumulative()[-1])

    def rescale(self, units: Floats) -> Floats:
        """Times at which the integral of the rate reaches each of `units`: float64[N], seconds.

        Within a segment the integral is r x + s x^2 / 2 = c; this form of the root is exact for slope 0 and loses no digits.
        """
        times, rates, total = np.array(self.times_s), np.array(self.rates_per_s), self._cumulative()
        segment = np.clip(np.searchsorted(total, units, side="right") - 1, 0, len(times) - 2)
        width = np.diff(times)
        slope = np.divide(np.diff(rates), width, out=np.zeros_like(width), where=width > 0)[segment]
        rest, rate = units - total[segment], rates[segment]
        root = rate + np.sqrt(np.maximum(rate * rate + 2 * slope * rest, 0))
        offset = np.divide(2 * rest, root, out=np.zeros_like(rest), where=root > 0)
        scaled: Floats = times[segment] + offset
        return scaled

    def _cumulative(self) -> Floats:
        areas = np.diff(self.times_s) * (np.array(self.rates_per_s[1:]) + np.array(self.rates_per_s[:-1])) / 2
        return np.concatenate([[0.0], np.cumsum(areas)])


def flat(rate_per_s: float, duration_s: float) -> RateProfile:
    """One rate all the time."""
    return RateProfile((0.0, duration_s), (rate_per_s, rate_per_s))


def ramp(start_per_s: float, end_per_s: float, duration_s: float) -> RateProfile:
    """A straight line from one rate to another."""
    return RateProfile((0.0, duration_s), (start_per_s, end_per_s))


def steps(rates_per_s: tuple[float, ...], duration_s: float) -> RateProfile:
    """Equally long stairs, with jumps between."""
    if not rates_per_s:
        raise LoadTestError("steps need at least one rate, such as --steps 5,10,20")
    edges = np.linspace(0.0, duration_s, len(rates_per_s) + 1).tolist()
    times = [time for left, right in itertools.pairwise(edges) for time in (left, right)]
    return RateProfile(tuple(times), tuple(rate for rate in rates_per_s for _ in range(2)))


def with_warmup(profile: RateProfile, warmup_s: float, *, gently: bool) -> RateProfile:
    """The profile after `warmup_s` seconds at its first rate, or (gently) on a line from 0 to its first rate."""
    if warmup_s < 0:
        raise LoadTestError(f"the warm-up is {warmup_s:g} s; it cannot be negative")
    if warmup_s == 0:
        return profile
    first = profile.rates_per_s[0]
    times = (0.0, warmup_s, *(warmup_s + time for time in profile.times_s))
    return RateProfile(times, (0.0 if gently else first, first, *profile.rates_per_s))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Intended send times: float64[N], seconds from the start, not decreasing; before warmup_s not measured."""

    times_s: Floats
    duration_s: float
    warmup_s: float
    arrivals: str
    dispersion: float
    seed: int | None

    def __post_init__(self) -> None:
        if len(self.times_s) == 0:
            raise LoadTestError("the schedule is empty: no request falls into it; raise the rate or the duration")
        if self.warmup_s >= self.duration_s:
            raise LoadTestError(f"the warm-up ({self.warmup_s:g} s) fills the whole schedule ({self.duration_s:g} s)")

    @property
    def measured_s(self) -> float:
        """Length of the measured part in seconds."""
        return self.duration_s - self.warmup_s


def draw_schedule(profile: RateProfile, *, dispersion: float, seed: int, warmup_s: float = 0.0) -> Schedule:
    """A schedule of the profile (its warm-up included).

    dispersion: variance over mean of the counts in a long window, which is the squared coefficient of variation of the gaps:
    0 evenly spaced, 1 Poisson, above 1 bursts (Gamma gaps of shape 1 / dispersion).
    """
    if not 0 <= dispersion <= MAX_DISPERSION:
        raise LoadTestError(
            f"dispersion is {dispersion:g}; choose 0 (constant), 1 (Poisson) or up to {MAX_DISPERSION:g} (bursts)"
        )
    units = _unit_process(profile.expected_count, dispersion, np.random.default_rng([seed, 0]))
    name = {0.0: "constant", 1.0: "poisson"}.get(dispersion, "gamma")
    return Schedule(profile.rescale(units), profile.duration_s, warmup_s, name, dispersion, seed)


def _unit_process(total: float, dispersion: float, rng: np.random.Generator) -> Floats:
    """Events of a stationary renewal process of rate 1 in [0, total).

    Stationary: the first event is a uniform part of a length-biased gap, not a whole gap, so that the mean count is `total`
    exactly, however bursty. Length-biased Gamma(k) is Gamma(k + 1).
    """
    if dispersion == 0:
        return np.arange(0.5, total)
    shape = 1 / dispersion
    events = [np.array([rng.uniform() * rng.gamma(shape + 1, dispersion)])]
    while events[-1][-1] < total:
        gaps = rng.gamma(shape, dispersion, size=int(total) + 64)
        events.append(events[-1][-1] + np.cumsum(gaps))
    joined = np.concatenate(events)
    return joined[joined < total]


def replay_trace(path: Path, *, speed: float = 1.0, warmup_s: float = 0.0) -> Schedule:
    """The schedule of a CSV file: first column seconds (any origin), one row per request, a header line or none.

    speed 2 halves every gap. Raises LoadTestError with the line number of the first bad row.
    """
    if not speed > 0:
        raise LoadTestError(f"speed is {speed:g}; it must be above 0 (2 replays twice as fast)")
    seconds = _read_seconds(path)
    times = (np.array(seconds) - seconds[0]) / speed if seconds else np.array([])
    if len(times) < 2 or times[-1] <= 0:
        raise LoadTestError(f"{path}: a trace needs at least two rows with different times")
    mean_gap = float(times[-1]) / (len(times) - 1)
    return Schedule(times, float(times[-1]) + mean_gap, warmup_s, f"trace {path.name} at speed {speed:g}", math.nan, None)


def _read_seconds(path: Path) -> list[float]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"cannot read the trace {path}: {error}") from error
    seconds: list[float] = []
    for number, row in enumerate(csv.reader(lines), start=1):
        if not row:
            continue
        try:
            value = float(row[0])
        except ValueError as error:
            if number == 1:
                continue  # the header
            raise LoadTestError(f"{path}:{number}: {row[0]!r} is not a number of seconds") from error
        if not math.isfinite(value):
            raise LoadTestError(f"{path}:{number}: {row[0]!r} is not a finite number of seconds")
        if seconds and value < seconds[-1]:
            raise LoadTestError(f"{path}:{number}: {value:g} comes before {seconds[-1]:g}; sort the trace by time")
        seconds.append(value)
    return seconds
