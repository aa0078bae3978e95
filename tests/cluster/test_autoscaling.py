"""What users of autoscalers complain about, each tried on a real Ray Serve: cascades, slow ramps, no way down, outages, ...

One service for all, in the order of this file. Its clock is scaled: 1 real second is 30 of the policy's, so a decision
comes every second, ten minutes without traffic take 20 s and a start-up of five minutes takes 10 s. GPUs are pretended, and
fewer than the policy may ask for: replicas beyond them stay pending, as in a full cluster.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from app.local_cluster import free_ports
from tests.cluster.autoscaling_service import Service, outage_file, stand_in_config
from tests.cluster.fleet import wait_until

pytestmark = pytest.mark.cluster

SCALE = 30
CAPACITY_PER_S = 60.0  # of a stand-in replica
MAX_STEP = 6
NUM_GPUS = 9
POLICY_TIME = "ray_serve_autoscaling_policy_execution_time_ms"
POOLS = {
    "main": {"min_replicas": 1, "max_replicas": 12},
    "slow": {"min_replicas": 1, "max_replicas": 12},
    "rare": {"min_replicas": 1, "max_replicas": 4},
    "sleepy": {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 2},
}
CAPACITY = {"capacity_per_s": CAPACITY_PER_S, "startup_s": 120, "usd_per_hour": 2.0}
POLICY = {
    "interval_s": 30,
    "warm_up_s": 120,
    "clock_scale": SCALE,
    "stale_after_s": 2.0,
    "max_step_up": MAX_STEP,
    "max_step_usd_per_hour": 16.0,
    "pools": {name: {**CAPACITY, "startup_s": 300 if name == "slow" else 120} for name in POOLS},
}


@pytest.fixture(scope="module")
def outage(ray_environment: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outage_file(tmp_path_factory.mktemp("outage"))


@pytest.fixture(scope="module")
def service(outage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("autoscaling")
    (port,) = free_ports(1)
    policy = {**POLICY, "log_path": str(directory / "decisions.jsonl")}
    raw = stand_in_config(port, POOLS, policy, "tests.cluster.autoscaling_stand_in:build_app")
    service = Service(raw, directory, NUM_GPUS)
    yield service
    service.shutdown()


def orders(decisions: list[dict[str, Any]]) -> list[int]:
    """Sizes of the increases of the target."""
    return [b["target"] - a["target"] for a, b in pairwise(decisions) if b["target"] > a["target"]]


def assert_no_cascade(decisions: list[dict[str, Any]]) -> None:
    """What arrived decides, however long the queue grows while an order loads: never more than 1.2 of the highest rate."""
    highest = 0.0
    for decision in decisions:
        highest = max(highest, decision["offered"])  # in a slot of one real second
        assert decision["target"] <= max(decisions[0]["target"], math.ceil(1.2 * highest / CAPACITY_PER_S)), decision


def test_grows_with_load_and_says_so(service: Service, report_figure: Callable[[str], None]) -> None:
    begin = time.time()
    with service.load("main", 100) as statuses:
        wait_until(lambda: service.running("main") >= 2, 30, "no second replica")
        up_s = time.time() - begin
        time.sleep(3)
        body = service.status()
        page = service.request("GET", "/metrics")[1].decode()
    autoscaling = body["main"]["autoscaling"]
    assert autoscaling["current"] == len(body["main"]["replicas"]) >= 2
    assert autoscaling["offered_per_s"] == pytest.approx(100, rel=0.3)
    assert autoscaling["reason"] in ("steady", "forecast", "patience")
    assert set(body) == set(POOLS)
    assert "ray_babelephant_autoscaling_target_replicas{" in page
    assert {status.split()[0] for status in statuses} <= {"200", "503"}  # a full queue while the second one starts
    report_figure(f"1 -> 2 replicas {up_s:.1f} s after the load began; status {json.dumps(autoscaling)}; {dict(statuses)}")


def test_a_fourfold_step_is_ordered_at_once(service: Service, report_figure: Callable[[str], None]) -> None:
    """Complaint: one replica at a time."""
    with service.load("main", 100):
        time.sleep(4)
        begin = time.time()
        with service.load("main", 300):
            wait_until(lambda: service.target("main") >= 7, 15, "no full order")
            wait_until(lambda: service.running("main") >= 6, 60, "replicas did not come")
            up_s = time.time() - begin
    ordered = orders(service.decisions("main", begin - 1))
    steps = service.decisions("main", begin)
    first = next(i for i, decision in enumerate(steps) if decision["target"] > 2)
    # The first sign is a part of a second; a decision later all of it has been seen.
    assert steps[first + 1]["target"] >= 6
    assert steps[first + 2]["target"] >= 7
    assert_no_cascade(steps)
    report_figure(f"step 100 -> 400/s: orders of {ordered}, 6 of 7 replicas served after {up_s:.1f} s")


def test_no_traffic_goes_to_the_minimum_or_zero(service: Service, report_figure: Callable[[str], None]) -> None:
    """Complaint: no traffic is read as no data, and nothing scales down. Ten minutes are 20 s here."""
    quiet_since = time.time()
    wait_until(lambda: service.running("main") == 1, 45, "main did not shrink")
    took_s = time.time() - quiet_since
    assert service.target("main") == 1
    reasons = {decision["reason"] for decision in service.decisions("main", quiet_since)}
    assert "idle" in reasons
    wait_until(lambda: service.running("sleepy") == 0, 30, "sleepy did not go to zero")
    assert service.status()["sleepy"]["replicas"] == []
    assert service.request("GET", "/readyz")[0] == 200
    woken_at = time.monotonic()
    assert service.translate("sleepy", 1) == "200"
    woken_s = time.monotonic() - woken_at
    report_figure(
        f"no traffic: main at its minimum after {took_s:.1f} s (10 min = 20 s), sleepy at 0; woken in {woken_s:.1f} s"
    )


def test_replicas_that_load_are_counted(service: Service, report_figure: Callable[[str], None]) -> None:
    """Complaint: a cascade while replicas load. A start of five minutes (10 s here), one step of load."""
    with service.load("slow", 30):
        time.sleep(6)
        begin = time.time()
        with service.load("slow", 120):
            wait_until(lambda: service.target("slow") >= 3, 10, "no order")
            ordered_at = time.time()
            wait_until(lambda: service.running("slow") >= 3, 60, "replicas did not come")
            ready_at = time.time()
            time.sleep(3)
    decisions = service.decisions("slow", begin)
    assert_no_cascade(decisions)
    backlog = max(decision["backlog"] for decision in decisions)
    report_figure(
        f"step 30 -> 150/s, start-up {ready_at - ordered_at:.1f} s: orders {orders(decisions)}, queue up to {backlog:.0f}"
    )


def test_without_metrics_nothing_changes(service: Service, outage: Path, report_figure: Callable[[str], None]) -> None:
    """Complaint: an outage of the metrics left fewer replicas than the minimum."""
    with service.load("slow", 150):
        time.sleep(3)
        before = service.target("slow")
        assert before >= 2
        outage.touch()
        time.sleep(4)
    silent_since = time.time()
    time.sleep(6)
    held = service.decisions("slow", silent_since)
    running = service.running("slow")
    everyone = {name: {d["target"] for d in service.decisions(name, silent_since)} for name in POOLS}
    outage.unlink()
    wait_until(lambda: service.decisions("slow")[-1]["reason"] != "no_metrics", 10, "metrics did not come back")
    assert len(held) >= 3
    assert {(d["target"], d["reason"]) for d in held} == {(before, "no_metrics")}
    assert running == before
    assert everyone["main"] == {1}
    assert everyone["rare"] == {1}
    report_figure(f"no metrics for {len(held)} decisions and no load: held {before} replicas of slow, 1 of main and of rare")


def test_an_edit_by_hand_converges(service: Service, report_figure: Callable[[str], None]) -> None:
    """Complaint: planner and manual edit disagree, stuck."""
    limits = POOLS["slow"]
    with service.load("slow", 100):
        wait_until(lambda: service.decisions("slow")[-1]["reason"] in ("steady", "patience"), 20, "not steady")
        before = service.decisions("slow")[-1]
        ids = {replica["replica_id"] for replica in service.status()["rare"]["replicas"]}
        edited = time.time()
        service.edit_limits("slow", 1, 1)
        wait_until(lambda: service.running("slow") == 1, 30, "the edit downwards did not work")
        down_s = time.time() - edited
        edited = time.time()
        service.edit_limits("slow", limits["min_replicas"], limits["max_replicas"])
        wait_until(lambda: service.target("slow") >= 2, 15, "the policy did not take over again")
        wait_until(lambda: service.running("slow") == service.target("slow"), 60, "did not converge")
        back_s = time.time() - edited
    after = service.decisions("slow", edited)
    assert after[-1]["forecast"] == pytest.approx(before["forecast"], rel=0.35), "the past was not forgotten"
    assert {replica["replica_id"] for replica in service.status()["rare"]["replicas"]} == ids
    lines = service.log_path.read_text().splitlines()
    assert sum("babelephant_decisions" in line for line in lines) == 1
    report_figure(
        f"edit by hand to 1 took {down_s:.1f} s, taken back: {back_s:.1f} s to {after[-1]['target']} replicas again"
    )


def test_a_huge_burst_is_ordered_in_capped_steps(service: Service, report_figure: Callable[[str], None]) -> None:
    """Complaint: a huge step on a bad forecast."""
    begin = time.time()
    with ThreadPoolExecutor(80) as clients:
        bursts = [clients.submit(service.translate, pool, 100) for _ in range(40) for pool in ("main", "slow")]
        wait_until(lambda: service.target("main") > 1, 15, "the burst was not seen")
        time.sleep(3)
    statuses = Counter(burst.result() for burst in bursts)
    both = list(zip(service.decisions("main", begin - 1.5), service.decisions("slow", begin - 1.5), strict=False))
    steps = [[after[i]["target"] - before[i]["target"] for i in (0, 1)] for before, after in pairwise(both)]
    reasons = {decision["reason"] for pair in both for decision in pair}
    wanted = max(decision["wanted"] for pair in both for decision in pair)
    assert wanted > 1 + 2 * MAX_STEP
    assert max(max(step) for step in steps) <= MAX_STEP
    assert max(sum(max(part, 0) for part in step) for step in steps) <= 8, "16 USD/h are 8 replicas"
    assert reasons & {"step_cap", "cost_cap"}
    assert max(d["target"] for pair in both for d in pair) <= 12
    report_figure(
        f"burst that wants {wanted} replicas a pool: steps (main, slow) {steps[:5]}, {reasons}, answers {statuses}"
    )


def test_no_pool_ever_lost_its_last_replica(service: Service, report_figure: Callable[[str], None]) -> None:
    """Complaint: the last replica that held a model was retired. `rare` saw no request at all."""
    decisions = service.decisions("rare")
    assert min(decision["target"] for decision in decisions) == 1
    assert {decision["offered"] for decision in decisions} == {0}
    (replica,) = service.status()["rare"]["replicas"]
    age_s = (decisions[-1]["time_s"] - decisions[0]["time_s"]) / SCALE
    assert replica["uptime_s"] >= age_s - 10, "it is the one of the beginning"
    report_figure(f"rare kept its one replica through {len(decisions)} decisions ({age_s:.0f} s) without a request")


def test_the_whole_run_replays_bit_for_bit(service: Service, report_figure: Callable[[str], None]) -> None:
    from app.autoscaling.decision_log import verify
    from app.cli import main

    copy = service.directory / "copy.jsonl"
    copy.write_bytes(service.log_path.read_bytes())
    verdict = verify(copy)
    assert verdict.num_decisions > 60
    assert (verdict.num_different, verdict.first_difference) == (0, "")
    assert main(["replay-decisions", str(copy)]) == 0
    page = service.request("GET", "/metrics")[1].decode()
    times = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(POLICY_TIME + "{")]
    report_figure(
        f"{verdict.num_decisions} decisions of 4 pools replayed, all equal; a call of the policy took {max(times):.2f} ms"
    )
    assert times
