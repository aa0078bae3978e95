"""The rule over calls that replicas tell, beside Serve's own rule in Serve's own wrapping; and what a replica tells."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config, replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from app.autoscaling.open_calls import OPEN_CALLS, scale_by_open_calls
from app.wire import Busy
from tests.app.fakes import FakeTranslator
from tests.app.test_direct_calls import Server, connected, eventually, requests, run

POOL = DeploymentID("p", "babelephant")
CONFIG = {"min_replicas": 0, "max_replicas": 10, "target_ongoing_requests": 4, "upscale_delay_s": 0, "downscale_delay_s": 0}


def context(
    calls: dict[str, float | None], *, queued: float = 0.0, serves_total: float = 0.0, target: int | None = None
) -> Any:
    """calls: what each running replica told, None for nothing yet; serves_total: what Serve counted itself."""
    replicas = {name: ReplicaID(name, POOL) for name in calls}
    told = {replicas[name]: count for name, count in calls.items() if count is not None}
    return AutoscalingContext(
        deployment_id=POOL,
        deployment_name="p",
        app_name="babelephant",
        current_num_replicas=len(calls),
        target_num_replicas=len(calls) if target is None else target,
        running_replicas=list(replicas.values()),
        total_num_requests=serves_total,
        total_queued_requests=queued,
        aggregated_metrics=lambda: {OPEN_CALLS: told, "other": {}} if told else {},
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=10,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig.model_validate(CONFIG),
    )


ours = _apply_autoscaling_config(scale_by_open_calls)
serves = _apply_autoscaling_config(replica_queue_length_autoscaling_policy)


@pytest.mark.parametrize("replicas", [1, 2, 5])
@pytest.mark.parametrize("total", [0, 1, 3, 4, 5, 11.5, 40])
@pytest.mark.parametrize("queued", [0, 6])
def test_direct_calls_scale_as_serve_scales_what_it_counts(replicas: int, total: float, queued: float) -> None:
    calls = {str(number): total / replicas for number in range(replicas)}
    wanted = ours(context(calls, queued=queued))[0]
    assert wanted == serves(context(calls, queued=queued, serves_total=total + queued))[0]
    assert serves(context(calls))[0] <= 1  # what it would do of its own accord


def test_a_new_replica_counts_like_the_mean_of_the_others() -> None:
    assert ours(context({"a": 8.0, "b": 8.0, "new": None}))[0] == 6


def test_without_any_report_the_number_stays() -> None:
    assert ours(context({"a": None, "b": None}, target=3))[0] == 3
    assert ours(context({}, target=2))[0] == 2


def test_a_pool_that_sleeps_wakes_for_a_call_that_waits() -> None:
    assert ours(context({}, queued=1.0, serves_total=1.0, target=0))[0] == 1


def test_a_replica_tells_the_calls_of_both_kinds() -> None:
    async def scenario() -> None:
        server = Server("a", FakeTranslator(max_rows=64, max_waiting=8))

        def open_calls() -> float:
            return server.replica.record_autoscaling_stats()[OPEN_CALLS]

        pool, _, links = await connected(server)
        assert open_calls() == 0.0
        link = links._links["a"]
        direct = [asyncio.create_task(link.call(requests("forever", "x", prefix=f"{i}-"), {})) for i in range(3)]
        by_handle = asyncio.create_task(server.replica.translate(requests("forever", prefix="h")))
        await eventually(lambda: open_calls() == 4.0)  # calls, however many sentences each has
        assert await pool.translate(requests(*["x"] * 40, prefix="full"), 60) == Busy()
        assert open_calls() == 4.0
        direct[0].cancel()
        by_handle.cancel()
        await eventually(lambda: open_calls() == 2.0)
        links.close()  # the ingress dies
        await eventually(lambda: open_calls() == 0.0)
        for task in (*direct, by_handle):
            task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await task
        assert json.dumps(server.replica.record_autoscaling_stats())
        server.stop()

    run(scenario)
