"""Request-arrival traces: what was offered in each window, and arrivals per second drawn from it.

A window holds its mean rate constant (`step`): joining window centres by lines would leak the next window's rate into
this one. The edges are shifted by a random time per seed, so that nothing can profit from knowing where they are.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DAY_S = 86_400
WEEK_S = 7 * DAY_S
_MAX_DISPERSION = 3.0


class TraceError(ValueError):
    """A trace that cannot be replayed; the message names the field and the fix."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One pool's offered load.

    rate_per_s float64[W] mean request rate of each window; dispersion float64[W] variance over mean of the count in one
    second (1 is Poisson), at most 3; window_s length of a window in seconds.
    """

    name: str
    window_s: int
    rate_per_s: Floats
    dispersion: Floats

    def __post_init__(self) -> None:
        if self.window_s < 1:
            raise TraceError(f"{self.name}: window_s is {self.window_s}; it must be at least 1 second")
        if self.rate_per_s.ndim != 1 or len(self.rate_per_s) < 1 or self.rate_per_s.shape != self.dispersion.shape:
            raise TraceError(f"{self.name}: rate_per_s and dispersion must be two equally long columns")
        if not np.all(np.isfinite(self.rate_per_s)) or np.any(self.rate_per_s < 0):
            raise TraceError(f"{self.name}: a rate is negative or not a number; rates are requests per second")
        if np.any(self.dispersion < 1) or np.any(self.dispersion > _MAX_DISPERSION):
            raise TraceError(f"{self.name}: dispersion must lie in [1, {_MAX_DISPERSION:g}]")

    @property
    def duration_s(self) -> int:
        """Length in seconds."""
        return self.window_s * len(self.rate_per_s)

    @property
    def mean_rate_per_s(self) -> float:
        """Mean rate over the whole trace."""
        return float(self.rate_per_s.mean())

    def arrivals(self, seed: int, start_s: int = 0, end_s: int | None = None) -> Ints:
        """Requests offered in each second of [start_s, end_s): int64[end_s - start_s].

        One seed gives one shift of the window edges and one draw for the whole trace, so parts of it fit together. Counts
        are Poisson with a gamma-distributed mean (negative binomial), independent from second to second.
        """
        rng = np.random.default_rng(seed)
        shift = int(rng.integers(self.window_s))
        window = np.minimum((np.arange(self.duration_s) + shift) // self.window_s, len(self.rate_per_s) - 1)
        mean = self.rate_per_s[window]
        excess = self.dispersion[window] - 1.0
        bursty = (excess > 0) & (mean > 0)
        intensity = mean.copy()
        intensity[bursty] = rng.gamma(mean[bursty] / excess[bursty], excess[bursty])
        counts: Ints = rng.poisson(intensity).astype(np.int64)
        return counts[start_s:end_s]


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def _read(path: Path | str) -> str:
    """Text of a file, or of a file that ships with the package when given by name."""
    raw = path.read_bytes() if isinstance(path, Path) else (resources.files("app.cost") / "data" / path).read_bytes()
    return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()


def _client_table(text: str) -> Floats:
    """float64[W, C]: windows by clients of a reshaped ServeGen file; idle cells are 0."""
    return np.array([[float(cell) if cell else 0.0 for cell in row[1:]] for row in _rows(text)[1:]])


def servegen_m_large() -> Trace:
    """All 162 clients of ServeGen m-large as one pool: 2016 windows of 600 s.

    A window's dispersion is the rate-weighted mean of its clients' squared inter-arrival CV (a renewal process's count
    variance over its mean tends to it), each held to [1, 3].
    """
    rates = _client_table(_read("servegen_m_large_rate_rps.csv.gz"))
    cv = _client_table(_read("servegen_m_large_iat_cv.csv.gz"))
    total = rates.sum(1)
    weighted = (rates * np.clip(cv**2, 1.0, _MAX_DISPERSION)).sum(1)
    dispersion = np.divide(weighted, total, out=np.ones_like(total), where=total > 0)
    return Trace("servegen-m-large", 600, total, dispersion)


def servegen_m_large_clients(count: int = 162) -> list[Trace]:
    """The clients of ServeGen m-large one by one, the busiest first: the public stand-in for language pairs."""
    rates = _client_table(_read("servegen_m_large_rate_rps.csv.gz"))
    cv = _client_table(_read("servegen_m_large_iat_cv.csv.gz"))
    busiest = np.argsort(-rates.sum(0), kind="stable")[:count]
    return [
        Trace(f"servegen-m-large/{client}", 600, rates[:, client], np.clip(cv[:, client] ** 2, 1.0, _MAX_DISPERSION))
        for client in busiest
    ]


def nyc_taxi(num_weeks: int = 8, mean_rate_per_s: float = 196.0) -> Trace:
    """The daily and weekly shape of New York taxi passengers, 30-minute windows from Tuesday 2014-07-01.

    Only the shape is used: scaled to `mean_rate_per_s` (m-large's) over these weeks. There are no inter-arrival times in
    it, so arrivals are Poisson.
    """
    rows = _rows(_read("nab_nyc_taxi.csv.gz"))[1:]
    passengers = np.array([float(value) for _, value in rows])[: num_weeks * 336]
    if len(passengers) < num_weeks * 336:
        raise TraceError(f"nyc-taxi has {len(passengers) // 336} whole weeks; {num_weeks} were asked for")
    return Trace("nyc-taxi", 1800, passengers * (mean_rate_per_s / passengers.mean()), np.ones(len(passengers)))


def read_csv(path: Path) -> Trace:
    """A trace of one's own: a header and the columns `time,requests[,dispersion]`, windows of equal length.

    `time` is seconds or an ISO date and time; `requests` the number offered in the window that starts there.
    Raises TraceError naming the line that cannot be used.
    """
    rows = _rows(_read(path))
    if len(rows) < 3 or len(rows[0]) < 2:
        raise TraceError(f"{path}: needs a header and at least two lines of `time,requests`")
    try:
        times = np.array([_seconds(row[0]) for row in rows[1:]])
        requests = np.array([float(row[1]) for row in rows[1:]])
        dispersion = np.array([float(row[2]) if len(row) > 2 else 1.0 for row in rows[1:]])
    except (ValueError, IndexError) as error:
        raise TraceError(f"{path}: {error}; every line is `time,requests[,dispersion]`") from error
    steps = np.diff(times)
    if steps[0] < 1 or np.any(np.abs(steps - steps[0]) > 0.5):
        line = int(np.argmax(np.abs(steps - steps[0]) > 0.5)) + 3
        raise TraceError(f"{path}:{line}: windows must follow each other at equal steps; fill gaps with 0 requests")
    window_s = round(float(steps[0]))
    return Trace(path.stem, window_s, requests / window_s, np.clip(dispersion, 1.0, _MAX_DISPERSION))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
