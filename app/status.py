"""Parts of `GET /v1/status`: expert loads, and the autoscaling policy's latest plan, from where the policy leaves it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from app.autoscaling.planner import PoolPlan
from app.autoscaling.publish import read_plans
from app.schemas import ExpertLoadBody, PoolAutoscalingBody
from engine.types import ExpertLoad

ReadPlans = Callable[[], Mapping[str, PoolPlan]]


def plans_of(application: str) -> ReadPlans:
    """Reader for one application's plans; waits for Ray's key-value store."""
    return lambda: read_plans(application)


async def autoscaling_bodies(read: ReadPlans) -> tuple[dict[str, PoolAutoscalingBody], str | None]:
    """Bodies by pool (none without a policy), and the policy's own message when its settings are wrong."""
    try:
        plans = await asyncio.to_thread(read)
    except RuntimeError as error:
        return {}, str(error)
    return {name: _body(plan) for name, plan in plans.items()}, None


def expert_load_body(load: ExpertLoad) -> ExpertLoadBody:
    """One stage of one replica."""
    return ExpertLoadBody(
        stage=load.stage,
        num_passes=load.num_passes,
        layers=list(load.layers),
        active_experts=[round(active / load.num_passes, 2) for active in load.num_active],
        skew=[round(skew, 3) for skew in load.skew],
    )


def _body(plan: PoolPlan) -> PoolAutoscalingBody:
    return PoolAutoscalingBody(
        current=plan.current,
        target=plan.target,
        pending=plan.pending,
        reason=plan.reason,
        forecast_per_s=round(plan.forecast_per_s, 3),
        offered_per_s=round(plan.offered_per_s, 3),
        backlog=round(plan.backlog, 1),
        decided_at=datetime.fromtimestamp(plan.decided_at_s, UTC).isoformat(timespec="milliseconds"),
        state=plan.state,
    )
