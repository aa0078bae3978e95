"""Direct calls on a real Ray Serve: a replica is killed, and replicas come and go, under load."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.local_cluster import free_ports
from tests.cluster.autoscaling_service import Service, outage_file, stand_in_config
from tests.cluster.fleet import wait_until

pytestmark = pytest.mark.cluster

_STAND_IN = "tests.cluster.autoscaling_stand_in:build_app"
_POLICY = {"pools": {"main": {"capacity_per_s": 60.0, "startup_s": 10, "usd_per_hour": 2.0}}}


def replica_pids() -> list[int]:
    """Processes of the pool's replicas, as Ray names them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith(b"ray::ServeReplica:babelephant:main"):
            found.append(int(folder.name))
    return found


def test_nothing_is_lost_when_replicas_die_or_go(
    ray_environment: str, tmp_path: Path, report_figure: Callable[[str], None]
) -> None:
    outage_file(tmp_path)
    (port,) = free_ports(1)
    policy = {**_POLICY, "log_path": str(tmp_path / "decisions.jsonl")}
    raw = stand_in_config(port, {"main": {"min_replicas": 2, "max_replicas": 2}}, policy, _STAND_IN)
    raw["applications"][0]["args"]["direct_calls"] = True
    service = Service(raw, tmp_path, num_gpus=4)
    try:
        with service.load("main", sentences_per_s=40, texts_per_request=2) as statuses:
            time.sleep(4)
            os.kill(replica_pids()[0], signal.SIGKILL)
            wait_until(lambda: service.running("main") == 1, 60, "Serve does not notice")
            wait_until(lambda: service.running("main") == 2, 60, "not replaced")
            for count in (1, 2, 1):
                service.edit_limits("main", count, count)
                wait_until(lambda count=count: service.running("main") == count, 60, f"not {count} replicas")  # type: ignore[misc]
                time.sleep(3)
        report_figure(f"direct calls, a SIGKILL and 2 -> 1 -> 2 -> 1 replicas at 20 requests/s: {dict(statuses)}")
        assert set(statuses) == {"200"}
        assert statuses["200"] > 200
        page = service.request("GET", "/metrics")[1].decode()
        lost = re.findall(r'lost_replica_calls_total\{[^}]*reason="(\w+)"', page)
        assert set(lost) == {"ReplicaGoneError"}  # of a direct connection, so that was the way taken
    finally:
        service.shutdown()
