"""Tuning on the past: which forecast and which scale would have met the goal at least cost.

The forest is cross-validated in contiguous folds, so that it is never judged on days it was fitted to. All scales are
replayed at once, as pools of one replay, by the sizing code that decides live. The past is easier to meet than the
future, so the goal is tightened: only `miss_share` of the allowed misses may be used on the past.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from app.cost.demand import DemandHistory, HorizonSpec
from app.cost.forecast import ForecastOptions, Rule, Untrained, fit_if_enough, refit_slots, row_slots, training_rows
from app.cost.judge import JudgeSpec
from app.cost.policy import Sizing, SizingOptions
from app.cost.replay import Observation, Outcome, replay
from app.cost.traces import Floats, Ints

_NUM_FOLDS = 7
_FOLD_GAP_S = 3600  # rows this close to a fold's edge share its weather and are left out


@dataclass(frozen=True, slots=True)
class Recording:
    """Histories run through once, each pool a history of its own: features float64[K, P, F], plain forecasts float64[K,
    P] by `rule`.
    """

    history: DemandHistory
    features: Floats
    untrained: Untrained
    rule: Rule

    @classmethod
    def of(cls, offered: Ints, horizon: HorizonSpec, rule: Rule = "peak") -> Recording:
        """Read offered int64[K, P] requests per slot."""
        history = DemandHistory(offered.shape[1], horizon, len(offered))
        first = history.push(offered[0])
        features, plain = np.empty((len(offered), *first.shape)), np.empty((3, *offered.shape))
        for slot, counts in enumerate(offered):
            features[slot] = history.push(counts) if slot else first
            now = Untrained.of(history, rule)
            plain[:, slot] = now.rule, now.proven, now.base
        return cls(history, features, Untrained(*plain), rule)

    def cross_validated(self, pool: int, options: ForecastOptions, end: int) -> Floats:
        """Forecast float64[end] after each of the first slots, by forests that saw neither a slot's fold nor the hour
        around it.
        """
        horizon = self.history.horizon
        gap = horizon.lead_slots + horizon.num_slots + _FOLD_GAP_S // horizon.interval_s
        edges = np.linspace(0, end, _NUM_FOLDS + 1).astype(int)
        forecast = np.empty(end)
        for begin, stop in pairwise(edges.tolist()):
            slots = self._row_slots(end)
            slots = slots[(slots < begin - gap) | (slots > stop + gap)]
            forecast[begin:stop] = self._forecast(pool, options, slots, end, begin, stop)
        return forecast

    def walked(self, pool: int, options: ForecastOptions, begin: int, end: int) -> Floats:
        """Forecast float64[end - begin] after each slot of [begin, end), exactly as a DemandForecaster would that saw all
        before.
        """
        every = refit_slots(options, self.history.horizon.interval_s)
        forecast = np.empty(end - begin)
        for fitted in range(begin // every * every, end, every):
            start, stop = max(begin, fitted), min(end, fitted + every)
            slots = self._row_slots(fitted + 1)
            forecast[start - begin : stop - begin] = self._forecast(pool, options, slots, fitted + 1, start, stop)
        return forecast

    def _row_slots(self, end: int) -> Ints:
        return np.arange(0, end, row_slots(self.history.horizon.interval_s))

    def _forecast(self, pool: int, options: ForecastOptions, slots: Ints, known: int, begin: int, end: int) -> Floats:
        """Fit on the rows at `slots`, as after `known` slots; forecasts after [begin, end)."""
        if options.rule != self.rule:
            raise ValueError(f"the history was recorded with rule {self.rule!r}, not {options.rule!r}; record it anew")
        plain = Untrained(
            *(part[begin:end, pool] for part in (self.untrained.rule, self.untrained.proven, self.untrained.base))
        )
        if options.forest_share == 0 or known <= refit_slots(options, self.history.horizon.interval_s):
            return plain.demand(None, options)
        alone = self.history.pool(pool)
        forest = fit_if_enough(*training_rows(alone, slots, self.features[slots, pool][:, None], known), options)
        return plain.demand(None if forest is None else forest.predict(self.features[begin:end, pool]), options)


class GivenForecast:
    """A policy whose forecasts are there beforehand: float64[K, P], one row per decision."""

    def __init__(self, forecasts: Floats, sizing: Sizing) -> None:
        self._forecasts = iter(forecasts)
        self._sizing = sizing

    def decide(self, seen: Observation) -> Ints:
        """int64[P] replicas wanted."""
        return self._sizing.size(next(self._forecasts), seen.backlog, seen.ready + seen.pending)


def replay_forecasts(arrivals: Ints, forecasts: Floats, spec: JudgeSpec, options: SizingOptions, scale: Floats) -> Outcome:
    """Size for forecasts float64[K, P] (made before each slot) over arrivals int64[T, P], at scale float64[P]."""
    sizing = Sizing(spec.capacity_per_s, options, scale)
    return replay(arrivals, GivenForecast(forecasts, sizing), spec, np.zeros(arrivals.shape[1], np.int64))


@dataclass(frozen=True, slots=True)
class TunedScale:
    """The choice, and what it would have cost on the past: replica-seconds at which attainment."""

    scale: float
    replica_seconds: float
    attainment: float


def tune_scales(
    arrivals: Ints,
    forecasts: Floats,
    spec: JudgeSpec,
    options: SizingOptions,
    scales: Floats,
    goal: float,
    miss_share: float,
) -> list[TunedScale]:
    """For each pool of arrivals int64[T, P] and forecasts float64[K, P] the smallest of `scales` that keeps the tightened
    goal.

    At most miss_share of the misses that `goal` allows may be used. Raises ValueError when no scale is enough: give
    larger ones.
    """
    pools, tries = arrivals.shape[1], len(scales)
    outcome = replay_forecasts(
        np.repeat(arrivals, tries, axis=1), np.repeat(forecasts, tries, axis=1), spec, options, np.tile(scales, pools)
    )
    allowed = (1.0 - goal) * miss_share
    attainment = outcome.pool_attainment.reshape(pools, tries)
    cost = outcome.replica_seconds.reshape(pools, tries)
    chosen = []
    for pool in range(pools):
        enough = np.flatnonzero(attainment[pool] >= 1.0 - allowed)
        if len(enough) == 0:
            raise ValueError(
                f"no scale up to {scales.max():.2f} keeps misses within {allowed:.3%} on the past "
                f"(best {1 - attainment[pool].max():.3%}); try larger ones"
            )
        best = int(enough[0])
        chosen.append(TunedScale(float(scales[best]), float(cost[pool, best]), float(attainment[pool, best])))
    return chosen
