"""What breaks while requests are under way: nothing that was accepted may be lost.

One fleet for all tests, in the order of this file; FAULT_SECONDS (default 30) of load in each.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fleet import STEP_POISON, THREAD_POISON, Fleet, wait_until
from tests.cluster.traffic import Traffic, nothing_lost
from tests.cluster.under_way import NUM_MATES, TARGET_OF_POOL, requests_under_way

pytestmark = pytest.mark.cluster

FAULT_S = float(os.environ.get("FAULT_SECONDS", "30"))
RATE_PER_S = 6.0
ROLLOUT_S = 60.0  # at least: the load has to outlast the rollout, or it proves nothing


@pytest.fixture(scope="module")
def fleet(start_fleet: Callable[..., Any]) -> Iterator[Fleet]:
    with start_fleet(import_path="tests.cluster.poisoned:build_app") as fleet:
        yield fleet


@pytest.fixture
def traffic(fleet: Fleet, tmp_path: Path) -> Traffic:
    fleet.wait_settled()
    return Traffic(fleet.url, tmp_path)


def test_killed_replicas(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """One of two replicas of `world`, then the only one of `europe`."""
    fleet.scale("world", 2)
    all_mates: list[int] = []
    with traffic.load("SIGKILL replicas", RATE_PER_S, FAULT_S) as tally:
        for pool in ("world", "europe"):
            pid = int(fleet.replicas(pool)[0]["Pid"])
            count = len(fleet.replicas(pool))
            with requests_under_way(fleet, pool) as mates:
                os.kill(pid, signal.SIGKILL)
                started = time.monotonic()
            fleet.wait_replaced(pool, {pid})
            whole_s = time.monotonic() - started
            tally.event(f"1 of {count} of {pool} killed, whole after {whole_s:.1f} s, {NUM_MATES} under way {mates}")
            all_mates += mates
    nothing_lost(tally, report_figure)
    assert all_mates == [200] * NUM_MATES * 2


def test_killed_controller(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """Traffic does not notice, no replica restarts, and a scale-down works afterwards."""
    before = {replica["Pid"] for pool in ("world", "europe") for replica in fleet.replicas(pool)}
    with traffic.load("SIGKILL controller", RATE_PER_S, FAULT_S) as tally:
        pid = fleet.controller_pid()
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        wait_until(
            lambda: [c["Pid"] for c in fleet.actors("SERVE_CONTROLLER_ACTOR")] not in ([], [pid]), 60, "no new controller"
        )
        fleet.wait_settled()
        tally.event(f"controller killed, back after {time.monotonic() - started:.1f} s")
        after = {replica["Pid"] for pool in ("world", "europe") for replica in fleet.replicas(pool)}
        tally.event(f"then world -> 1 took {fleet.scale('world', 1):.1f} s")
    nothing_lost(tally, report_figure)
    assert after == before


@pytest.mark.parametrize("text", [STEP_POISON, THREAD_POISON])
def test_poison(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None], text: str) -> None:
    """A sentence that makes the engine raise fails; its batch mates and everybody else are answered."""
    with traffic.load(text, RATE_PER_S, FAULT_S) as tally:
        with requests_under_way(fleet, "world") as mates:
            body = {"source_lang": "en", "target_lang": TARGET_OF_POOL["world"], "texts": [text]}
            status, _, answer = fleet.request("/v1/translate", body)
        tally.event(f"poisoned request {status}, its {NUM_MATES} mates {mates}")
        time.sleep(5)
        fleet.wait_settled()
    report_figure(str(tally))
    assert (status, json.loads(answer)["error"]["code"]) == (500, "engine_failed")
    assert mates == [200] * NUM_MATES
    assert (tally.lost, tally.client_error) == (0, 0), str(tally)


def test_rolling_redeploy(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """Changed `args` restart every replica, the ingress too."""
    raw = copy.deepcopy(fleet.raw)
    raw["applications"][0]["args"]["default_beam_size"] = 2
    before = {pool: {int(replica["Pid"]) for replica in fleet.replicas(pool)} for pool in ("ingress", "world", "europe")}
    with traffic.load("rolling redeploy", RATE_PER_S, max(FAULT_S, ROLLOUT_S)) as tally:
        started = time.monotonic()
        fleet.deploy(raw)
        for name, pids in before.items():
            fleet.wait_replaced(name, pids)
        tally.event(f"new args rolled out in {time.monotonic() - started:.1f} s")
    nothing_lost(tally, report_figure)


def test_sigterm_to_a_node(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """What a node gets when its machine is taken away in an orderly way."""
    with traffic.load("SIGTERM node", RATE_PER_S, FAULT_S) as tally:
        (replica,) = fleet.replicas("europe")
        victim = fleet.node_of(replica)
        started = time.monotonic()
        fleet.remove_node(victim, graceful=True)
        stopped_s = time.monotonic() - started
        fleet.add_node("small", 1)
        fleet.wait_replaced("europe", {replica["Pid"]})
        tally.event(f"node ended in {stopped_s:.1f} s, europe whole after {time.monotonic() - started:.1f} s")
    nothing_lost(tally, report_figure)
