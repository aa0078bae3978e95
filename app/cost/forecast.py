"""Forecast of the quantile of the largest demand over [start-up, start-up + horizon], per pool, learnt from what was seen.

Two forecasts are blended. The forest (app.cost.boosting) learns a quantile of the growth from now to the highest
one-minute rate of the horizon, and is fitted again every day. The rule needs no training. For bursty demand it is "peak":
most of the last half hour's peak and a little of the day's mean; blended with the forest they miss less than either,
because they fail at different times. For demand that repeats by day and week it is "season": the largest growth seen at
this time of an earlier day (DemandHistory.seasonal_peak), best on its own. Nothing may stay below what the newest seconds
prove (the step detector): a jump is ordered for in the slot after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from app.cost.boosting import BoostingOptions, QuantileForest, fit_quantile_forest
from app.cost.demand import DemandHistory, HorizonSpec
from app.cost.traces import DAY_S, Floats, Ints

_PEAK_SHARE = 0.85  # of the half hour's peak in the rule; the rest is the day's mean
_RULE_HEADROOM = 1.15  # brings the rule to the level of a 0.95 quantile, so that one scale fits every blend
_ROW_S = 60  # one training row a minute
_MAX_ROWS = 24_000


Rule = Literal["peak", "season"]


@dataclass(frozen=True, slots=True)
class ForecastOptions:
    """quantile and number of trees of the forest; forest_share in [0, 1], the rest is the rule's; refit_s seconds between
    fits; step_headroom over a rate that the newest seconds prove.
    """

    quantile: float = 0.95
    forest_share: float = 0.6
    num_trees: int = 120
    depth: int = 3
    min_leaf: int = 200
    refit_s: int = DAY_S
    seed: int = 0
    rule: Rule = "peak"
    step_headroom: float = 1.1

    def __post_init__(self) -> None:
        if not 0 <= self.forest_share <= 1:
            raise ValueError(f"forest_share is {self.forest_share}; it must lie between 0 and 1")
        if self.rule not in ("peak", "season"):
            raise ValueError(f"rule is {self.rule!r}; choose 'peak' or 'season'")
        if self.step_headroom < 0:
            raise ValueError(f"step_headroom is {self.step_headroom}; it must be at least 0")

    def boosting(self) -> BoostingOptions:
        """Options of one fit."""
        return BoostingOptions(self.quantile, self.num_trees, self.depth, 0.06, self.min_leaf, 0.5, self.seed)


def training_rows(
    history: DemandHistory, slots: Ints, features: Floats, num_known: int | None = None
) -> tuple[Floats, Floats]:
    """(rows float64[R, F], growth float64[R]) from features float64[S, P, F] of slots int64[S] whose horizon was over.

    Pools follow each other within a slot; evenly thinned to at most 24 000 rows. num_known: as after so many slots.
    """
    growth = history.growth_target(slots, num_known)
    known = np.flatnonzero(~np.isnan(growth).any(1))
    thin = max(1, -(-len(known) * growth.shape[1] // _MAX_ROWS))
    known = known[::thin]
    return features[known].reshape(-1, features.shape[2]), growth[known].ravel()


@dataclass(frozen=True, slots=True)
class Untrained:
    """Forecasts that need no training, float64[P] (or one row per slot) requests per second."""

    rule: Floats
    proven: Floats
    base: Floats

    @classmethod
    def of(cls, history: DemandHistory, rule: Rule) -> Untrained:
        """From the newest slot; "season" is "peak" until a day has been seen."""
        wanted = _RULE_HEADROOM * (_PEAK_SHARE * history.highest_half_hour + (1 - _PEAK_SHARE) * history.day_mean)
        if rule == "season":
            seasonal = history.seasonal_peak()
            wanted = np.where(np.isnan(seasonal), wanted, seasonal)
        return cls(np.asarray(wanted), history.proven, history.base)

    def demand(self, growth: Floats | None, options: ForecastOptions) -> Floats:
        """The blend with the forest's log growth over base (None before it is fitted), never below the proven step."""
        blended = self.rule
        if growth is not None and options.forest_share > 0:
            blended = options.forest_share * np.exp(growth) * self.base + (1 - options.forest_share) * self.rule
        return np.asarray(np.maximum(blended, options.step_headroom * self.proven))


class DemandForecaster:
    """Keeps the history of P pools and forecasts from it; identical in replay and live. The forest is fitted every
    `refit_s`.
    """

    def __init__(self, num_pools: int, horizon: HorizonSpec, options: ForecastOptions) -> None:
        self.history = DemandHistory(num_pools, horizon)
        self.options = options
        self.forest: QuantileForest | None = None
        self._slots: list[int] = []
        self._features: list[Floats] = []

    def observe(self, offered: Ints) -> Floats:
        """Add the slot just ended, int64[P] requests; forecast of demand float64[P] requests per second."""
        features = self.history.push(offered)
        newest = self.history.num_slots - 1
        interval_s = self.history.horizon.interval_s
        if newest % row_slots(interval_s) == 0:
            self._slots.append(newest)
            self._features.append(features)
        if newest and newest % refit_slots(self.options, interval_s) == 0 and self.options.forest_share > 0:
            rows, growth = training_rows(self.history, np.array(self._slots), np.array(self._features))
            self.forest = fit_if_enough(rows, growth, self.options)
        growth_now = None if self.forest is None else self.forest.predict(features)
        return Untrained.of(self.history, self.options.rule).demand(growth_now, self.options)


def row_slots(interval_s: int) -> int:
    """Slots from one training row to the next."""
    return max(1, round(_ROW_S / interval_s))


def refit_slots(options: ForecastOptions, interval_s: int) -> int:
    """Slots from one fit of the forest to the next."""
    return max(1, options.refit_s // interval_s)


def fit_if_enough(rows: Floats, growth: Floats, options: ForecastOptions) -> QuantileForest | None:
    """A forest, or None while there are fewer rows than it needs."""
    return fit_quantile_forest(rows, growth, options.boosting()) if len(rows) >= 2 * options.min_leaf else None


def horizon_for(startup_s: int, interval_s: int, hold_s: int = 600) -> HorizonSpec:
    """What a decision must cover: from start-up until the next decision and `hold_s` seconds after."""
    return HorizonSpec(startup_s, interval_s + hold_s, interval_s)
