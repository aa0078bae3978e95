"""What slows down, fills up or goes blind while requests are under way; and the one loss that a client has to help with.

One fleet for all tests, in the order of this file; FAULT_SECONDS (default 30) of load in each.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fleet import MEMORY_POISON, SLOW_POISON, SLOW_S, SLOW_STEP_S, Fleet, wait_until
from tests.cluster.traffic import Traffic, nothing_lost
from tests.cluster.under_way import NUM_MATES, SENTENCES, TARGET_OF_POOL, requests_under_way

pytestmark = pytest.mark.cluster

FAULT_S = float(os.environ.get("FAULT_SECONDS", "30"))
RATE_PER_S = 6.0
ROLLOUT_S = 60.0  # at least: the load has to outlast the rollout, or it proves nothing
RETRY_AFTER_S = 60.0  # of the one retry of a client whose only entry proxy died: Serve took up to 34 s to start another
NUM_FLOODERS = 12


@pytest.fixture(scope="module")
def fleet(start_fleet: Callable[..., Any]) -> Iterator[Fleet]:
    with start_fleet(import_path="tests.cluster.poisoned:build_app", patient=True) as fleet:
        fleet.scale("world", 2)
        yield fleet


@pytest.fixture
def traffic(fleet: Fleet, tmp_path: Path) -> Traffic:
    fleet.wait_settled()
    return Traffic(fleet.url, tmp_path)


def translate_body(*texts: str, pool: str = "world") -> dict[str, Any]:
    return {"source_lang": "en", "target_lang": TARGET_OF_POOL[pool], "texts": list(texts)}


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Frozen processes: alive, connected, and without an answer."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_slow_and_frozen_replica(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """One of two replicas is slowed down many times, later frozen for 5 s: shorter than the health check's patience."""
    with traffic.load("slow replica", RATE_PER_S, FAULT_S) as tally:
        status, _, _ = fleet.request("/v1/translate", translate_body(SLOW_POISON))
        tally.event(
            f"a step of 1 of 2 world replicas takes {SLOW_STEP_S} s more for {SLOW_S:g} s (its own request: {status})"
        )
        time.sleep(SLOW_S)
        with requests_under_way(fleet, "world") as mates, stopped([int(fleet.replicas("world")[0]["Pid"])]):
            time.sleep(5)
        tally.event(f"1 of 2 frozen for 5 s, {NUM_MATES} requests under way {mates}")
    nothing_lost(tally, report_figure)
    assert status == 200
    assert mates == [200] * NUM_MATES


def test_memory_of_the_device_runs_out(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """Injected: there is no GPU here. Encoder passes are halved until they fit, and no replica restarts."""
    pids = {replica["Pid"] for replica in fleet.replicas("world")}
    with traffic.load("out of memory", RATE_PER_S, FAULT_S) as tally:
        answers = Counter(
            fleet.request("/v1/translate", translate_body(*[MEMORY_POISON, *SENTENCES[:3]] * 3))[0] for _ in range(8)
        )
        tally.event(f"8 requests of 12 sentences whose passes find no memory: {dict(answers)}")
    nothing_lost(tally, report_figure)
    assert answers == {200: 8}
    assert {replica["Pid"] for replica in fleet.replicas("world")} == pids


def test_full_queue(fleet: Fleet, report_figure: Callable[[str], None]) -> None:
    """Two replicas hold 24 sentences each; clients without pause send 12 at a time: refused at once, well afterwards."""
    raw = copy.deepcopy(fleet.raw)
    (world,) = [d for d in raw["applications"][0]["deployments"] if d["name"] == "world"]
    world["user_config"] = {"max_pending": 24}
    fleet.deploy(raw)
    end = time.monotonic() + FAULT_S

    def flood(_: int) -> list[tuple[int, str, float]]:
        seen = []
        while time.monotonic() < end:
            sent = time.monotonic()
            status, raw_headers, answer = fleet.request("/v1/translate", translate_body(*SENTENCES))
            headers = {name.lower(): value for name, value in raw_headers.items()}
            code = json.loads(answer).get("error", {}).get("code", "")
            seen.append((status, f"{code} {headers.get('retry-after', '-')}", time.monotonic() - sent))
            time.sleep(0.05 if status == 503 else 0)
        return seen

    with ThreadPoolExecutor(NUM_FLOODERS) as clients:
        seen = [entry for entries in clients.map(flood, range(NUM_FLOODERS)) for entry in entries]
    statuses = Counter((status, kind) for status, kind, _ in seen)
    refused = sorted(seconds for status, _, seconds in seen if status == 503)
    report_figure(
        f"full queue: {NUM_FLOODERS} clients without pause for {FAULT_S:g} s, sent {len(seen)}, "
        f"{ {f'{status} {kind}': count for (status, kind), count in statuses.items()} }, "
        f"a refusal takes p50 {refused[len(refused) // 2]:.3f} max {refused[-1]:.3f} s"
    )
    assert set(statuses) == {(200, " -"), (503, "busy 1")}
    assert fleet.request("/v1/translate", translate_body(*SENTENCES))[0] == 200
    del world["user_config"]
    fleet.deploy(raw)


def test_metrics_are_lost(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """The exporters of all nodes hang, first one, then all: translations do not notice, /metrics says what it can."""
    agents = metrics_agents()
    assert len(agents) == 1 + len(fleet.nodes)
    with traffic.load("metrics loss", RATE_PER_S, FAULT_S) as tally:
        whole = samples(fleet)
        with stopped(agents[-1:]):
            one_gone = samples(fleet)
        with stopped(agents):
            status, _, answer = fleet.request("/metrics")
            time.sleep(3)
        wait_until(lambda: samples(fleet) >= whole, 30, "the metrics do not come back")
        tally.event(f"samples on /metrics: {whole}, 1 of {len(agents)} exporters frozen: {one_gone}, all frozen: {status}")
    nothing_lost(tally, report_figure)
    assert one_gone > 0
    assert (status, json.loads(answer)["error"]["code"]) == (503, "metrics_unavailable")


def samples(fleet: Fleet) -> int:
    """Samples on the metrics page; 0 when there is none."""
    status, _, page = fleet.request("/metrics")
    return sum(not line.startswith("#") for line in page.decode().splitlines()) if status == 200 else 0


def metrics_agents() -> list[int]:
    """Process ids of the agents that hold the nodes' exporters: children of our raylets, which started with our token."""
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    raylets, agents = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if command.startswith(b"ray::DashboardAgent"):
                agents[int(folder.name)] = parent
            elif b"/raylet/raylet" in command.split(b"\0")[0] and token in (folder / "environ").read_bytes():
                raylets.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(agent for agent, parent in agents.items() if parent in raylets)


def test_surge_rollout(fleet: Fleet, traffic: Traffic, report_figure: Callable[[str], None]) -> None:
    """New `args` with room for a successor beside every replica: nobody is refused."""
    fleet.add_node("small", 1)
    raw = copy.deepcopy(fleet.raw)
    raw["applications"][0]["args"]["default_beam_size"] = 2
    for deployment in raw["applications"][0]["deployments"]:
        deployment["max_surge_percent"] = 100
    before = {name: {int(replica["Pid"]) for replica in fleet.replicas(name)} for name in ("ingress", "world", "europe")}
    with traffic.load("surge rollout", RATE_PER_S, max(FAULT_S, ROLLOUT_S)) as tally:
        started = time.monotonic()
        fleet.deploy(raw)
        for name, pids in before.items():
            fleet.wait_replaced(name, pids)
        tally.event(f"new args rolled out in {time.monotonic() - started:.1f} s with max_surge_percent 100")
    nothing_lost(tally, report_figure)
    assert tally.refused == 0


def test_killed_entry_proxy(fleet: Fleet, report_figure: Callable[[str], None]) -> None:
    """Connections of the killed proxy break: that is the client's to see. One retry each, and nobody is left without."""
    (proxy,) = [int(actor["Pid"]) for actor in fleet.actors("SERVE_PROXY_ACTOR")]
    first: Counter[str] = Counter()
    after_retry: Counter[str] = Counter()

    def client(number: int) -> None:
        time.sleep(number / RATE_PER_S)
        outcome = attempt(fleet)
        first[outcome] += 1
        if outcome != "200":
            time.sleep(RETRY_AFTER_S)
            outcome = attempt(fleet)
        after_retry[outcome] += 1

    num_requests = int(RATE_PER_S * FAULT_S)
    with ThreadPoolExecutor(64) as clients:
        futures = [clients.submit(client, number) for number in range(num_requests)]
        time.sleep(FAULT_S / 3)
        os.kill(proxy, signal.SIGKILL)
        started = time.monotonic()
        wait_until(lambda: attempt(fleet) == "200", 60, "the proxy does not come back")
        back_s = time.monotonic() - started
        for future in futures:
            future.result()
    report_figure(
        f"SIGKILL the entry proxy (the only one, HeadOnly): sent {num_requests}, first attempt {dict(first)}, after one "
        f"retry {RETRY_AFTER_S:g} s later {dict(after_retry)}; proxy back after {back_s:.1f} s"
    )
    assert first["200"] < num_requests
    assert after_retry == {"200": num_requests}


def attempt(fleet: Fleet) -> str:
    try:
        return str(fleet.request("/v1/translate", translate_body(SENTENCES[0]))[0])
    except OSError as error:
        return type(getattr(error, "reason", error)).__name__
