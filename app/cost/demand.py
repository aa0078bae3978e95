"""Demand seen so far, per pool: rolling means, maxima and the same hours of earlier days, kept up slot by slot in
constant time.

Nothing here reads the clock: a slot is known by how long ago it was, so shifting all times changes no feature, and
nothing is told the edges of a trace's windows. The features' looks into earlier days average half an hour, which blurs
such edges into straight lines; only `seasonal_peak` looks sharply, so that it meets again what came at this minute of an
earlier day.

Letters: P pools, N rolling windows, F features, L earlier days and weeks, E ends of rolling windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.cost.traces import DAY_S, WEEK_S, Floats, Ints

_MEAN_S = (10, 30, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 28_800, 86_400)
_EXTREME_S = (300, 600, 1200, 1800, 3600, 10_800, 28_800)
_BASE_S = 60
_BLUR_S = 1800  # earlier days are looked at through windows of this width
_SEASON_MEAN_S = 180  # rates compared with those of earlier days: shorter is noise, longer hides when a rise begins
_SEASON_DAYS, _SEASON_WEEKS = 7, 4
_MAX_REGIME = 4.0  # a level more than this over an earlier day's is not that day's shape any more
_TINY_PER_S = 1e-3
_DISPERSION_WEIGHT = 1 / 360  # of the newest slot in the running dispersion
_OUTLIER = 9.0  # a step between two slots is a change of rate, not noise: 3 sigma is the most it may add


@dataclass(frozen=True, slots=True)
class HorizonSpec:
    """The time a decision must cover: from start-up to start-up + length_s after it, in slots of interval_s seconds."""

    startup_s: int
    length_s: int
    interval_s: int

    @property
    def lead_slots(self) -> int:
        """Slots until an order taken now serves."""
        return -(-self.startup_s // self.interval_s)

    @property
    def num_slots(self) -> int:
        """Slots of the horizon, at least one."""
        return self.slots(self.length_s)

    def slots(self, seconds: float) -> int:
        """A time in whole slots, at least one."""
        return max(1, round(seconds / self.interval_s))


class RollingExtremes:
    """Maxima over the last w slots for several w, exact, by doubling: the maximum of 2w slots is that of two of w.

    float64[P] in, float64[N, P] out. Before w slots were seen, those seen so far count.
    """

    def __init__(self, num_series: int, windows: Ints) -> None:
        self.windows = np.maximum(windows, 1)
        levels = int(self.windows.max()).bit_length()
        self._size = int(self.windows.max()) + 1
        self._best = np.full((levels, self._size, num_series), -np.inf)
        self._level = np.array([int(w).bit_length() - 1 for w in self.windows])
        self._span = 1 << self._level
        self._count = 0

    def push(self, values: Floats) -> Floats:
        """Add one slot; the maxima of all windows that end with it."""
        now = self._count % self._size
        best = self._best
        best[0, now] = values
        for level in range(1, len(best)):
            half = 1 << (level - 1)
            if half <= self._count:
                np.maximum(best[level - 1, now], best[level - 1, (self._count - half) % self._size], out=best[level, now])
            else:
                best[level, now] = best[level - 1, now]
        self._count += 1
        earlier = self._count - 1 - (self.windows - self._span)
        older = best[self._level, np.maximum(earlier, 0) % self._size]
        return np.asarray(np.maximum(best[self._level, now], older))


class DemandHistory:
    """All that was offered to P pools, in slots of `interval_s`, with the features of the newest slot.

    `base` float64[P] is the mean rate of the last minute; every other feature is a log ratio to it, so that a forecast is
    a growth and pools of any size share one model. `proven` float64[P] is the rate that the newest seconds alone prove,
    `dispersion` the running variance over mean of a slot's count.
    """

    def __init__(self, num_pools: int, horizon: HorizonSpec, capacity_slots: int = 1 << 14) -> None:
        self.horizon = horizon
        self._mean_windows = np.array([horizon.slots(seconds) for seconds in _MEAN_S])
        self._base_window = horizon.slots(_BASE_S)
        self._highest = RollingExtremes(2 * num_pools, np.array([horizon.slots(seconds) for seconds in _EXTREME_S]))
        self._half_hour = int(np.flatnonzero(np.array(_EXTREME_S) == 1800)[0])
        self._offered = np.zeros((capacity_slots + 1, num_pools), np.int64)  # cumulated counts: exact
        self._bases = np.zeros((capacity_slots, num_pools))
        self.num_slots = 0
        self._blur = horizon.slots(_BLUR_S)
        lead, width = horizon.lead_slots, horizon.num_slots
        self._ahead = np.array([lead, lead + width // 2, lead + width, lead + width + self._blur // 2])
        self._day, self._week = DAY_S // horizon.interval_s, WEEK_S // horizon.interval_s
        self.base = np.zeros(num_pools)
        self.highest_half_hour = np.zeros(num_pools)
        self.day_mean = np.zeros(num_pools)
        self.dispersion = np.ones(num_pools)
        self.proven = np.zeros(num_pools)

    @property
    def num_pools(self) -> int:
        """P."""
        return self._offered.shape[1]

    def pool(self, index: int) -> DemandHistory:
        """One pool's past alone, to learn from; it cannot be pushed to."""
        alone = DemandHistory(1, self.horizon, 1)
        alone._offered, alone._bases = self._offered[:, index : index + 1], self._bases[:, index : index + 1]
        alone.num_slots = self.num_slots
        return alone

    def push(self, offered: Ints) -> Floats:
        """Add the slot just ended, int64[P] requests; its features float64[P, F]."""
        if self.num_slots == len(self._bases):
            self._offered = np.concatenate([self._offered, np.zeros_like(self._offered)])
            self._bases = np.concatenate([self._bases, np.zeros_like(self._bases)])
        count = self.num_slots
        self._offered[count + 1] = self._offered[count] + offered
        self.num_slots = count = count + 1
        means = self._rates(count, self._mean_windows)
        self.base = np.maximum(self._rate(count, self._base_window), _TINY_PER_S)
        self._bases[count - 1] = self.base
        extremes = self._highest.push(np.concatenate([self.base, -self.base]))
        highest, lowest = extremes[:, : self.num_pools], -extremes[:, self.num_pools :]
        self.highest_half_hour, self.day_mean = highest[self._half_hour], means[-1]
        self.proven = self._proven_rate(count)
        ratios = np.concatenate([means, highest, lowest])
        logs = np.log(np.maximum(ratios, _TINY_PER_S) / self.base)
        return np.asarray(np.concatenate([logs, self._earlier_growth(count)]).T)

    def seasonal_peak(self) -> Floats:
        """float64[P]: the highest rate within the horizon if it grew like any of the last 7 days or 4 weeks did from this
        time on, requests per second; NaN before a day has been seen.

        A maximum, not a mean: rises differ from day to day, and being short costs more than being long. Each growth counts
        from the mean of three minutes to the highest such mean up to the end of the horizon, start-up included, because
        what is removed now is missing at once.
        """
        window = self.horizon.slots(_SEASON_MEAN_S)
        reach = self.horizon.lead_slots + self.horizon.num_slots + window
        periods = np.concatenate([self._day * np.arange(1, _SEASON_DAYS + 1), self._week * np.arange(1, _SEASON_WEEKS + 1)])
        then = self.num_slots - periods[periods >= reach]
        then = then[then >= window]
        if len(then) == 0:
            return np.full(self.num_pools, np.nan)
        rates = self._rate(then[:, None] + np.arange(reach + 1), window)  # [L, E, P]
        now = self._rate(self.num_slots, window)
        regime = np.minimum(now / np.maximum(rates[:, 0], _TINY_PER_S), _MAX_REGIME)
        return np.asarray(np.maximum((rates.max(1) * regime).max(0), now))

    def growth_target(self, slots: Ints, num_known: int | None = None) -> Floats:
        """float64[R, P]: log of the highest one-minute rate within the horizon over the base at each slot (0 is the first).

        Slots whose horizon is not over yet give NaN; num_known: as things stood when only so many slots had been seen.
        """
        num_known = self.num_slots if num_known is None else num_known
        lead, width = self.horizon.lead_slots, self.horizon.num_slots
        bases = self._bases[:num_known]
        result = np.full((len(slots), self.num_pools), np.nan)
        known = slots + lead + width < num_known
        if known.any():
            window = np.lib.stride_tricks.sliding_window_view(bases, width, axis=0)
            result[known] = np.log(window[slots[known] + lead + 1].max(-1) / bases[slots[known]])
        return result

    def _proven_rate(self, count: int, sigmas: float = 3.0) -> Floats:
        """float64[P]: the rate that the newest slot, or the newest two, prove: their mean less 3 standard errors of
        counting.
        """
        newest = self._offered[count] - self._offered[count - 1]
        if count > 1:
            before = self._offered[count - 1] - self._offered[count - 2]
            noise = np.minimum((newest - before) ** 2 / np.maximum(newest + before, 1.0), _OUTLIER * self.dispersion)
            self.dispersion = np.maximum(self.dispersion + _DISPERSION_WEIGHT * (noise - self.dispersion), 1.0)
        two = self._offered[count] - self._offered[max(count - 2, 0)]
        slots = min(count, 2)
        proven = np.maximum(
            newest - sigmas * np.sqrt(self.dispersion * newest), (two - sigmas * np.sqrt(self.dispersion * two)) / slots
        )
        return np.asarray(np.maximum(proven, 0.0) / self.horizon.interval_s)

    def _rate(self, end: int | Ints, window: int) -> Floats:
        """Mean rate over the `window` slots before slot index `end` (fewer at the beginning), requests per second."""
        begin = np.maximum(np.asarray(end) - window, 0)
        span = np.maximum(np.asarray(end) - begin, 1) * float(self.horizon.interval_s)
        total = self._offered[end] - self._offered[begin]
        return np.asarray(total / (span[..., None] if span.ndim else span))

    def _rates(self, end: int, windows: Ints) -> Floats:
        begin = np.maximum(end - windows, 0)
        return np.asarray(
            (self._offered[end] - self._offered[begin]) / ((end - begin) * float(self.horizon.interval_s))[:, None]
        )

    def _earlier_growth(self, count: int) -> Floats:
        """float64[6, P]: what the last 7 days at this hour, and the last 4 weeks on this day, say about the horizon.

        For each of the two: the mean growth from then to the highest point of the horizon, the newest such growth, and
        the mean level there over the base. The horizon is followed for half a blur more, because a blurred step is
        complete only then. All logs; 0 where there is no such past.
        """
        rows = []
        half = self._blur // 2
        for period, periods in ((self._day, 7), (self._week, 4)):
            then = count - period * np.arange(1, periods + 1)
            then = then[then - half >= 0]
            if len(then) == 0 or self._ahead[-1] + half > period:
                rows += [np.zeros(self.num_pools)] * 3
                continue
            later = self._rate(then[:, None] + self._ahead + half, self._blur).max(1)
            now = self._rate(then + half, self._blur)
            growth = np.log(np.maximum(later, _TINY_PER_S) / np.maximum(now, _TINY_PER_S))
            level = np.log(np.maximum(later.mean(0), _TINY_PER_S) / self.base)
            rows += [growth.mean(0), growth[0], level]
        return np.array(rows)
