"""What `autoscaling_policy.policy_kwargs` in the Serve YAML may say. Unknown keys are errors.

Serve restarts every replica when these change; replica limits (min_replicas, max_replicas) live in the YAML's
`deployments:` and change in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.autoscaling.policy import LivePolicy
from app.cost.forecast import ForecastOptions, Rule
from app.cost.guards import GuardOptions, PoolSpec
from app.cost.policy import SizingOptions

POLICY_PATH = "app.autoscaling.serve_policy:FleetAutoscaler"

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Whole = Annotated[int, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]
_GUARDS, _FORECAST = GuardOptions(), ForecastOptions()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolCapacity(_Strict):
    """One pool. capacity_per_s: sentences per second that one replica serves at the wanted latency; startup_s: whole
    seconds from order to serving; both as measured. scale of the forecast, as tuned by `babelephant replay`.
    usd_per_hour of a replica.

    Instead of capacity_per_s: profile, a file of `babelephant profile` on the head node. Capacity then follows from it, from
    slo_s (p99 of a sentence) and arrival_cv2 (burstiness) as in `babelephant plan`, and from the lengths that are learnt
    while the service runs; source_tokens and target_tokens of a sentence are what it starts with.
    """

    capacity_per_s: _Positive | None = None
    profile: Path | None = None
    slo_s: _Positive = 1.0
    arrival_cv2: _Positive = 1.0
    source_tokens: _Positive | None = None
    target_tokens: _Positive | None = None
    startup_s: _Whole
    scale: _Positive = 1.0
    usd_per_hour: _NotNegative = 0.0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.capacity_per_s is None) == (self.profile is None):
            raise ValueError("give capacity_per_s or profile, one of them")
        if self.profile is not None and None in (self.source_tokens, self.target_tokens):
            raise ValueError("profile needs source_tokens and target_tokens of a sentence to start with")
        return self


class AutoscalingSettings(_Strict):
    """The policy of one application; pools by deployment name. Times in seconds, meaning as in app.cost.guards.GuardOptions,
    app.cost.policy.SizingOptions and app.cost.forecast.ForecastOptions.

    log_path: file of decisions on the head node, from which a new controller also learns the past; null for none.
    lengths_path: file of learnt lengths there, for pools with a profile; read at the start, written every ten minutes; null
    for none. lengths_half_life_s: after which traffic counts half for them (a new file's; 14 days).
    drain_s is 0, no order for what waits, because the service refuses what it cannot serve in time (a bounded queue).
    stale_after_s: a replica's newest report may be that old. clock_scale: policy seconds per real second, for tests;
    capacities and stale_after_s stay in real time.
    """

    pools: Annotated[dict[str, PoolCapacity], Field(min_length=1)]
    log_path: Path | None = None
    lengths_path: Path | None = None
    lengths_half_life_s: _Positive = 14 * 86_400.0
    interval_s: _Count = _GUARDS.interval_s
    hold_s: _Whole = _GUARDS.hold_s
    idle_s: _Count = _GUARDS.idle_s
    warm_up_s: _Whole = _GUARDS.warm_up_s
    patience: _Count = _GUARDS.sizing.patience
    drain_s: _NotNegative = _GUARDS.sizing.drain_s
    max_step_up: _Count | None = None
    max_step_down: _Count | None = None
    max_step_usd_per_hour: _Positive | None = None
    forest_share: Annotated[float, Field(ge=0, le=1)] = _FORECAST.forest_share
    quantile: Annotated[float, Field(gt=0, lt=1)] = _FORECAST.quantile
    rule: Rule = _FORECAST.rule
    step_headroom: _NotNegative = _FORECAST.step_headroom
    stale_after_s: _Positive = 15.0
    clock_scale: _Positive = 1.0

    @model_validator(mode="after")
    def _can_decide(self) -> Self:
        self.policy()
        return self

    @property
    def period_s(self) -> float:
        """Real seconds between decisions."""
        return self.interval_s / self.clock_scale

    def policy(self) -> LivePolicy:
        """A new policy that has seen nothing. Raises ValueError for options that contradict each other."""
        pools = tuple(
            # Every reading says the capacity again; 1 stands for one that a profile will say.
            PoolSpec(name, (pool.capacity_per_s or 1.0) / self.clock_scale, pool.startup_s, pool.scale, pool.usd_per_hour)
            for name, pool in self.pools.items()
        )
        options = GuardOptions(
            interval_s=self.interval_s,
            hold_s=self.hold_s,
            idle_s=self.idle_s,
            warm_up_s=self.warm_up_s,
            max_step_up=self.max_step_up,
            max_step_down=self.max_step_down,
            max_step_usd_per_hour=self.max_step_usd_per_hour,
            sizing=SizingOptions(patience=self.patience, drain_s=self.drain_s, minimum=0),
            forecast=ForecastOptions(
                quantile=self.quantile, forest_share=self.forest_share, rule=self.rule, step_headroom=self.step_headroom
            ),
        )
        return LivePolicy(pools, options)
