"""The policy: measured load in, replica totals out. The same object decides in replay and on a live cluster.

    wanted = ceil((load + min(backlog / drain_s, max_drain_share * load)) / capacity of a replica),  load = scale * forecast

More is ordered at once; fewer only when every decision of the last `patience` slots wanted fewer (a slot's noise orders
and removes nothing). A backlog is new work: what waits now is ordered for on top of the forecast, because all that
arrives behind it is late.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.cost.forecast import DemandForecaster
from app.cost.replay import Observation
from app.cost.traces import Floats, Ints


@dataclass(frozen=True, slots=True)
class SizingOptions:
    """How demand becomes replicas.

    scale of the forecast (tuned to the wanted attainment); drain_s seconds in which extra replicas would clear a backlog,
    0 ignores it; max_drain_share of the forecast that a backlog may add; patience slots; max_step replicas that one
    decision may add per pool, None for no limit.
    """

    scale: float = 1.0
    drain_s: float = 60.0
    max_drain_share: float = 1.0
    patience: int = 3
    minimum: int = 1
    max_step: int | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0 or self.patience < 1 or min(self.drain_s, self.max_drain_share, self.minimum) < 0:
            raise ValueError("scale must be positive, patience at least 1, drain_s, max_drain_share and minimum at least 0")
        if self.max_step is not None and self.max_step < 1:
            raise ValueError("max_step must be at least 1, or None for no limit")


class Sizing:
    """Demand to replicas for P pools. `capacity_per_s` and `scale` may differ per pool (float64[P])."""

    def __init__(self, capacity_per_s: float | Floats, options: SizingOptions, scale: Floats | None = None) -> None:
        self.capacity_per_s = capacity_per_s
        self.options = options
        self.scale = np.asarray(options.scale if scale is None else scale, np.float64)
        self._wanted: list[Ints] = []

    @property
    def newest_wanted(self) -> Ints:
        """int64[P]: what the last call wanted before patience and step cap."""
        return self._wanted[-1]

    def size(self, demand: Floats, backlog: Floats, current: Ints) -> Ints:
        """int64[P] replicas wanted.

        demand float64[P] requests per second, backlog float64[P] requests, current int64[P] replicas, pending included.
        """
        load = demand * self.scale
        if self.options.drain_s > 0:
            load = load + np.minimum(backlog / self.options.drain_s, self.options.max_drain_share * load)
        # A tolerance of 1e-9 replicas: a load of exactly n replicas must not order n + 1 for a rounding error.
        wanted = np.maximum(np.ceil(load / self.capacity_per_s - 1e-9), self.options.minimum).astype(np.int64)
        first = not self._wanted
        self._wanted = [*self._wanted[-(self.options.patience - 1) :], wanted] if self.options.patience > 1 else [wanted]
        if first:
            return wanted
        lasting = np.max(self._wanted, axis=0) if len(self._wanted) == self.options.patience else np.maximum(wanted, current)
        result = np.maximum(wanted, np.minimum(lasting, current))
        if self.options.max_step is not None:
            result = np.minimum(result, np.maximum(current, self.options.minimum) + self.options.max_step)
        return result


class QuantilePolicy:
    """Forecast a quantile of the coming maximum, then size for it."""

    def __init__(self, forecaster: DemandForecaster, sizing: Sizing) -> None:
        self.forecaster = forecaster
        self.sizing = sizing
        self.demand = np.zeros(forecaster.history.num_pools)  # the newest forecast, requests per second

    def decide(self, seen: Observation) -> Ints:
        """int64[P] replicas wanted."""
        self.demand = self.forecaster.observe(seen.offered)
        return self.sizing.size(self.demand, seen.backlog, seen.ready + seen.pending)
