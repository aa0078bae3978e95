"""Durations as HDR histograms: three significant digits from 1 µs to 1 hour, mergeable, in the standard V2 encoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hdrh.histogram import HdrHistogram
from pydantic import BaseModel, ConfigDict

_UNIT_S = 1e-6
_HIGHEST = 3_600_000_000
_DIGITS = 3
CURVE_PERCENTILES = (0, 10, 25, 50, 75, 90, 95, 97.5, 99, 99.5, 99.75, 99.9, 99.95, 99.99, 100)


class LatencySummary(BaseModel):
    """Seconds. curve: seconds at CURVE_PERCENTILES; hdr: the histogram in microseconds, HdrHistogram V2 in base64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    p99_9_s: float
    max_s: float
    curve_s: list[float]
    hdr: str


def summarise(durations_s: Iterable[float]) -> LatencySummary | None:
    """None without any duration; negative ones (clock steps below a microsecond) count as 0, those over 1 h as 1 h."""
    histogram, total = HdrHistogram(1, _HIGHEST, _DIGITS), 0
    for duration_s in durations_s:
        value = min(max(round(duration_s / _UNIT_S), 0), _HIGHEST)
        histogram.record_value(value)
        total += value
    return _summary(histogram, total)


def merge(summaries: Sequence[LatencySummary]) -> LatencySummary | None:
    """One summary over several runs, exact up to the histogram's resolution."""
    histogram = HdrHistogram(1, _HIGHEST, _DIGITS)
    for summary in summaries:
        histogram.add(HdrHistogram.decode(summary.hdr.encode()))
    return _summary(histogram, sum(summary.mean_s * summary.count for summary in summaries) / _UNIT_S)


def _summary(histogram: HdrHistogram, total_us: float) -> LatencySummary | None:
    """The histogram could give the mean too, but takes a tenth of a second for it."""
    if not histogram.get_total_count():
        return None

    wanted = [50, 90, 95, 99, 99.9, *CURVE_PERCENTILES]
    at = {p: float(us) * _UNIT_S for p, us in histogram.get_percentile_to_value_dict(wanted).items()}  # one pass for all
    return LatencySummary(
        count=histogram.get_total_count(),
        mean_s=total_us / histogram.get_total_count() * _UNIT_S,
        p50_s=at[50],
        p90_s=at[90],
        p95_s=at[95],
        p99_s=at[99],
        p99_9_s=at[99.9],
        max_s=at[100],
        curve_s=[at[percentile] for percentile in CURVE_PERCENTILES],
        hdr=histogram.encode().decode(),
    )
