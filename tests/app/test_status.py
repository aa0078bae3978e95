"""The autoscaling part of GET /v1/status, over HTTP, with plans as the policy leaves them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from app.autoscaling.planner import PoolPlan
from app.errors import ServiceError
from app.ingress import build_api
from app.metric_recorders import IngressMetrics
from app.pools import ReplicaStatus
from app.prometheus import MetricsRelay
from app.settings import ServiceSettings
from app.status import ReadPlans, plans_of
from app.translation import TranslationService
from engine.types import EngineStats, ExpertLoad

SETTINGS = ServiceSettings.model_validate({"pools": {"main": {}, "rare": {"pairs": ["en-ja"]}}})
STATS = EngineStats(
    num_waiting=0,
    num_running=1,
    num_live_rows=1,
    max_rows=4,
    max_waiting=8,
    num_encode_passes=0,
    num_decode_steps=0,
    expert_loads=(ExpertLoad("decode", (1, 3), 8, (64, 64), (20, 61), (2.71828, 1.5), (0.34, 0.19)),),
)


def plan(target: int) -> PoolPlan:
    return PoolPlan(
        current=min(target, 1),
        target=target,
        pending=max(target - 1, 0),
        reason="forecast",
        forecast_per_s=12.34567,
        offered_per_s=10.0,
        backlog=3.0,
        decided_at_s=1_700_000_000.5,
        state="deciding",
    )


class FixedPool:
    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    async def translate(self, requests: Any, budget_s: float) -> Any:
        raise NotImplementedError

    async def status(self) -> tuple[ReplicaStatus, ...]:
        if not self.replicas:
            raise ServiceError("pool_unavailable", "none answers")
        return tuple(ReplicaStatus(f"r{i}", "cpu", ("eng_Latn",), STATS, 5.0) for i in range(self.replicas))


def get(path: str, read_plans: ReadPlans, rare_replicas: int = 1) -> tuple[int, Any]:
    async def call() -> tuple[int, Any]:
        service = TranslationService(SETTINGS, {"main": FixedPool(2), "rare": FixedPool(rare_replicas)})
        api = build_api(service, IngressMetrics(), MetricsRelay(list), echo_request_id=True, read_plans=read_plans)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://service") as client:
            response = await client.get(path)
        return response.status_code, response.json()

    return asyncio.run(call())


def pools(read_plans: ReadPlans, rare_replicas: int = 1) -> Mapping[str, Any]:
    status, body = get("/v1/status", read_plans, rare_replicas)
    assert status == 200, body
    assert body["autoscaling_error"] is None
    return {pool["name"]: pool for pool in body["pools"]}


def test_every_pool_shows_its_newest_decision() -> None:
    shown = pools(lambda: {"main": plan(3)})
    assert shown["main"]["autoscaling"] == {
        "current": 1,
        "target": 3,
        "pending": 2,
        "reason": "forecast",
        "forecast_per_s": 12.346,
        "offered_per_s": 10.0,
        "backlog": 3.0,
        "decided_at": "2023-11-14T22:13:20.500+00:00",
        "state": "deciding",
    }
    assert len(shown["main"]["replicas"]) == 2
    assert shown["main"]["replicas"][1]["expert_loads"] == [
        {"stage": "decode", "num_passes": 8, "layers": [1, 3], "active_experts": [2.5, 7.62], "skew": [2.718, 1.5]}
    ]
    assert shown["rare"]["autoscaling"] is None


def test_without_a_policy_and_without_ray_there_is_nothing_to_show() -> None:
    assert pools(plans_of("no such application"))["main"]["autoscaling"] is None


def test_a_pool_put_to_sleep_is_no_failure_but_one_that_fails_is() -> None:
    asleep = {"rare": plan(0)}
    shown = pools(lambda: asleep, rare_replicas=0)
    assert (shown["rare"]["replicas"], shown["rare"]["autoscaling"]["target"]) == ([], 0)
    assert get("/readyz", lambda: asleep, rare_replicas=0)[0] == 200
    assert shown["rare"]["error"] is None
    for read_plans in (lambda: {"rare": plan(1)}, dict):
        status, body = get("/readyz", read_plans, rare_replicas=0)
        assert (status, body["error"]["code"], body["error"]["details"]) == (503, "not_ready", {"pools": ["rare"]})


def test_the_status_of_a_broken_pool_does_not_hide_the_others() -> None:
    shown = pools(dict, rare_replicas=0)
    assert (shown["rare"]["replicas"], shown["rare"]["error"]) == ([], "none answers")
    assert (len(shown["main"]["replicas"]), shown["main"]["error"]) == (2, None)


def test_wrong_settings_are_told_and_hide_nothing_else() -> None:
    def broken() -> Mapping[str, PoolPlan]:
        raise RuntimeError("policy_kwargs are wrong: intervall_s")

    status, body = get("/v1/status", broken)
    assert status == 200
    assert body["autoscaling_error"] == "policy_kwargs are wrong: intervall_s"
    assert len(body["pools"]) == 2
