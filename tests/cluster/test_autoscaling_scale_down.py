"""Fifty forced scale-downs under load: nothing that was sent is lost.

SCALE_DOWNS (default 50) sets how many.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.local_cluster import free_ports
from tests.cluster.autoscaling_service import Service, outage_file, stand_in_config
from tests.cluster.fleet import wait_until

pytestmark = pytest.mark.cluster

SCALE_DOWNS = int(os.environ.get("SCALE_DOWNS", "50"))
POOLS = ("main", "rare")  # scaled down together: two at a time
MANY, FEW = 3, 2
LOAD_PER_S = 90.0  # sentences; a stand-in serves 60
POLICY = {
    "interval_s": 10,
    "clock_scale": 10,
    "pools": {name: {"capacity_per_s": 60, "startup_s": 30} for name in POOLS},
}


def with_count(raw: dict[str, Any], count: int) -> dict[str, Any]:
    """Every pool fixed at `count` replicas."""
    changed = copy.deepcopy(raw)
    for deployment in changed["applications"][0]["deployments"]:
        if deployment["name"] in POOLS:
            deployment["autoscaling_config"] |= {"min_replicas": count, "max_replicas": count}
    return changed


def work_by_replica(service: Service) -> dict[str, int]:
    """Sentences that every replica holds."""
    pools = service.status()
    replicas = [replica for pool in POOLS for replica in pools[pool]["replicas"]]
    return {replica["replica_id"]: replica["num_running"] + replica["num_waiting"] for replica in replicas}


def test_no_request_is_lost_in_scale_downs(
    ray_environment: str, tmp_path: Path, report_figure: Callable[[str], None]
) -> None:
    outage_file(tmp_path)
    (port,) = free_ports(1)
    policy = {**POLICY, "log_path": str(tmp_path / "decisions.jsonl")}
    import_path = "tests.cluster.autoscaling_stand_in:build_app"
    raw = stand_in_config(port, {pool: {"min_replicas": 1, "max_replicas": 9} for pool in POOLS}, policy, import_path, 1024)
    service = Service(with_count(raw, MANY), tmp_path, num_gpus=MANY * len(POOLS))
    num_downs, with_work, begin = 0, 0, time.monotonic()
    try:
        with service.load("main", LOAD_PER_S, 15) as main, service.load("rare", LOAD_PER_S, 15) as rare:
            while num_downs < SCALE_DOWNS:
                wait_until(lambda: all(service.running(pool) == MANY for pool in POOLS), 90, "no further replicas")
                time.sleep(0.5)  # the router has found them
                before = work_by_replica(service)
                service.deploy(with_count(raw, FEW))
                wait_until(lambda: all(service.running(pool) == FEW for pool in POOLS), 60, "no scale-down")
                left = work_by_replica(service)
                with_work += sum(work > 0 for replica, work in before.items() if replica not in left)
                num_downs += len(POOLS)
                service.deploy(with_count(raw, MANY))
        seconds = time.monotonic() - begin
    finally:
        service.shutdown()
    answers = main + rare
    report_figure(
        f"{num_downs} scale-downs {MANY} -> {FEW} in {seconds:.0f} s under 2 x {LOAD_PER_S:g} texts/s: {answers.total()} "
        f"requests, answers {dict(answers)}; {with_work} of the removed replicas held work just before"
    )
    assert set(answers) == {"200"}, answers
    assert with_work > num_downs / 5
    assert answers.total() > 0.8 * seconds * 2 * LOAD_PER_S / 15
