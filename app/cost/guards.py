"""The policy of a whole fleet: forecast and size every pool, then let nothing through that a running service would regret.

What the guards do, in this order: an idle pool goes to its minimum; nothing is removed before enough was seen, nor what
the load of right now needs (consolidation); one decision adds or removes only so many replicas, and only so many USD per
hour; a pool whose metrics are missing keeps what it has; minimum and maximum hold always. Replay and the live autoscaler
call the same `plan`, and its result depends on nothing but the observations so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from app.cost.forecast import DemandForecaster, ForecastOptions, horizon_for
from app.cost.policy import QuantilePolicy, Sizing, SizingOptions
from app.cost.replay import Observation
from app.cost.traces import DAY_S, Floats, Ints

Bools = npt.NDArray[np.bool_]

_CLEARED_WITHIN_S = 60.0  # what waits counts as load of right now: nothing is removed that would leave it waiting longer

# Why a pool's target is what it is; the last guard that changed it is named.
REASONS = (
    "steady",  # as many as before
    "forecast",  # more, for the forecast
    "backlog",  # more than the forecast needs, for what waits
    "surplus",  # fewer
    "patience",  # fewer were wanted, but not for long enough
    "idle",  # no request for idle_s
    "warm_up",  # fewer were wanted, but too little has been seen yet
    "consolidation",  # fewer were wanted, but the load of right now needs them
    "step_cap",  # one decision may not change more
    "cost_cap",  # one decision may not cost more
    "no_metrics",  # held: metrics are missing
    "minimum",
    "maximum",
)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool: capacity_per_s requests per second of a replica; startup_s from order to serving; scale of the forecast
    (tuned to the wanted attainment); usd_per_hour of a replica, for the cost cap.
    """

    name: str
    capacity_per_s: float
    startup_s: int
    scale: float = 1.0
    usd_per_hour: float = 0.0

    def __post_init__(self) -> None:
        if not (self.capacity_per_s > 0 and self.scale > 0 and self.usd_per_hour >= 0 and self.startup_s >= 0):
            raise ValueError(
                f"pool {self.name}: capacity_per_s and scale must be positive, startup_s and usd_per_hour at least 0"
            )


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """interval_s between decisions; hold_s: how far beyond a start-up to forecast; idle_s without a request until a pool
    goes to its minimum; warm_up_s before anything is removed; max_step_up and max_step_down replicas per pool and
    decision, max_step_usd_per_hour that one decision may add over all pools: None is no limit. `sizing` as in
    app.cost.policy, but for its max_step, which is not used.
    """

    interval_s: int = 10
    hold_s: int = 600
    idle_s: int = 600
    warm_up_s: int = 600
    max_step_up: int | None = None
    max_step_down: int | None = None
    max_step_usd_per_hour: float | None = None
    sizing: SizingOptions = field(default_factory=lambda: SizingOptions(drain_s=0, minimum=0))
    forecast: ForecastOptions = field(default_factory=ForecastOptions)

    def __post_init__(self) -> None:
        if self.interval_s < 1 or self.idle_s < self.interval_s or min(self.hold_s, self.warm_up_s) < 0:
            raise ValueError("interval_s must be at least 1, idle_s at least interval_s, hold_s and warm_up_s at least 0")
        if any(step is not None and step < 1 for step in (self.max_step_up, self.max_step_down)):
            raise ValueError("max_step_up and max_step_down must be at least 1, or null for no limit")


@dataclass(frozen=True, slots=True)
class Limits:
    """Per pool [P]: fewest and most replicas, and whether its metrics of the slot just ended are there."""

    minimum: Ints
    maximum: Ints
    known: Bools


@dataclass(frozen=True, slots=True)
class FleetDecision:
    """Per pool [P]: target replicas, pending ones included; what sizing wanted before patience and guards; forecast in
    requests per second before scale; why.
    """

    target: Ints
    wanted: Ints
    forecast: Floats
    reason: tuple[str, ...]


class GuardedPolicy:
    """Decides for P pools. Pools with one start-up time share a forecaster."""

    def __init__(self, pools: tuple[PoolSpec, ...], options: GuardOptions) -> None:
        self.pools = pools
        self.options = options
        self._capacity = np.array([pool.capacity_per_s for pool in pools])
        self._usd = np.array([pool.usd_per_hour for pool in pools])
        budget = options.max_step_usd_per_hour
        if budget is not None and not (self._usd.min(initial=np.inf) > 0 and budget >= self._usd.max(initial=0)):
            raise ValueError(
                f"max_step_usd_per_hour is {budget:g}: every pool needs a usd_per_hour, and none may be above it"
            )
        self._groups = [self._group(startup_s) for startup_s in sorted({pool.startup_s for pool in pools})]
        zero = np.zeros(len(pools), np.int64)
        self._last_offered, self._idle_slots, self._known_slots = zero, zero.copy(), zero.copy()
        self._last_s: float | None = None

    def _group(self, startup_s: int) -> tuple[Ints, QuantilePolicy]:
        members = [index for index, pool in enumerate(self.pools) if pool.startup_s == startup_s]
        horizon = horizon_for(startup_s, self.options.interval_s, self.options.hold_s)
        scale = np.array([self.pools[index].scale for index in members])
        sizing = Sizing(self._capacity[members], replace(self.options.sizing, max_step=None), scale)
        return np.array(members), QuantilePolicy(DemandForecaster(len(members), horizon, self.options.forecast), sizing)

    @property
    def started(self) -> bool:
        """Whether anything was observed yet."""
        return self._last_s is not None

    def states(self) -> tuple[str, ...]:
        """Per pool: `waiting` for its first metrics, `warming_up` (nothing is removed), or `deciding`."""
        cold = self._known_slots * self.options.interval_s < self.options.warm_up_s
        return tuple(
            "waiting" if count == 0 else "warming_up" if young else "deciding"
            for count, young in zip(self._known_slots.tolist(), cold.tolist(), strict=True)
        )

    def decide(self, seen: Observation) -> Ints:
        """Replay's Policy: all metrics there, sizing's minimum, no maximum."""
        minimum = np.full(len(self.pools), self.options.sizing.minimum)
        return self.plan(seen, Limits(minimum, np.full(len(self.pools), 1 << 40), minimum >= 0)).target

    def plan(self, seen: Observation, limits: Limits) -> FleetDecision:
        """Decide. `offered` and `backlog` of pools that are not known do not matter; skipped slots are taken to have
        been like the one before.
        """
        current = seen.ready + seen.pending
        offered = np.where(limits.known, seen.offered, self._last_offered)
        backlog = np.where(limits.known, seen.backlog, 0.0)
        wanted, forecast, rate = np.zeros_like(current), np.zeros(len(current)), np.zeros(len(current))
        missed = self._missed_slots(seen.time_s)
        for members, policy in self._groups:
            for _ in range(missed):
                policy.forecaster.observe(self._last_offered[members])
            part = Observation(
                seen.time_s,
                offered[members],
                seen.late[members],
                backlog[members],
                seen.ready[members],
                seen.pending[members],
            )
            wanted[members] = policy.decide(part)
            forecast[members] = policy.demand
            rate[members] = np.maximum(policy.forecaster.history.base, part.offered / self.options.interval_s)
        self._count(limits.known, offered, backlog)
        self._last_offered, self._last_s = offered, seen.time_s
        needed = np.concatenate([policy.sizing.newest_wanted for _, policy in self._groups])
        plain = np.empty_like(needed)
        plain[np.concatenate([members for members, _ in self._groups])] = needed
        load = (rate + backlog / _CLEARED_WITHIN_S) / self._capacity
        return self._guarded(current, wanted, plain, forecast, np.ceil(load - 1e-9).astype(np.int64), limits)

    def _missed_slots(self, time_s: float) -> int:
        """Slots between the last observation and this one; a day at most."""
        if self._last_s is None:
            return 0
        slots = round((time_s - self._last_s) / self.options.interval_s) - 1
        return min(max(slots, 0), DAY_S // self.options.interval_s)

    def _count(self, known: Bools, offered: Ints, backlog: Floats) -> None:
        self._known_slots = self._known_slots + known
        quiet = known & (offered == 0) & (backlog <= 0)
        self._idle_slots = np.where(quiet, self._idle_slots + 1, 0)

    def _guarded(
        self, current: Ints, wanted: Ints, plain: Ints, forecast: Floats, needed_now: Ints, limits: Limits
    ) -> FleetDecision:
        """wanted: after patience; plain: before; needed_now: replicas that the load of right now fills."""
        options, scale = self.options, np.array([pool.scale for pool in self.pools])
        forecast_alone = np.ceil(forecast * scale / self._capacity - 1e-9)
        reason = np.select(
            [wanted > np.maximum(current, forecast_alone), wanted > current, wanted < current, plain < current],
            ["backlog", "forecast", "surplus", "patience"],
            "steady",
        ).astype(object)
        target = wanted.copy()

        def change(mask: Bools, value: Ints, why: str, always: bool = False) -> None:
            named = mask if always else mask & (value != target)
            target[mask], reason[named] = value[mask], why

        idle = self._idle_slots * options.interval_s >= options.idle_s
        change(idle, np.minimum(target, limits.minimum), "idle", always=True)
        cold = self._known_slots * options.interval_s < options.warm_up_s
        change(cold & (target < current), current, "warm_up")
        change(~idle, np.maximum(target, np.minimum(current, needed_now)), "consolidation")
        base = np.maximum(current, limits.minimum)
        if options.max_step_up is not None:
            change(limits.known, np.minimum(target, base + options.max_step_up), "step_cap")
        if options.max_step_down is not None:
            change(limits.known, np.maximum(target, current - options.max_step_down), "step_cap")
        change(~limits.known, current, "no_metrics", always=True)
        change(target > limits.maximum, limits.maximum, "maximum")
        change(target < limits.minimum, limits.minimum, "minimum")
        if options.max_step_usd_per_hour is not None:
            change(target > base, self._within_budget(base, target, options.max_step_usd_per_hour), "cost_cap")
        return FleetDecision(target, plain, forecast, tuple(str(why) for why in reason))

    def _within_budget(self, base: Ints, target: Ints, budget: float) -> Ints:
        """Grant replicas one at a time to the pool furthest from its target until the next one would cost too much."""
        granted = np.minimum(base, target)
        while True:
            open_pools = np.flatnonzero((granted < target) & (self._usd <= budget + 1e-9))
            if len(open_pools) == 0:
                return granted
            first = open_pools[np.argmin(granted[open_pools] / target[open_pools])]
            granted[first] += 1
            budget -= float(self._usd[first])
