"""The death of a node, and of a machine, while direct calls are under way.

A fake node dies with all its processes, whose connections the kernel closes at once. A machine says nothing any more: that
is played with a network namespace whose cable is pulled, which takes root.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.wire import CallAddress, Translated
from engine.types import TranslationRequest
from tests.cluster.fleet import REPOSITORY
from tests.cluster.traffic import Traffic, nothing_lost
from tests.cluster.under_way import NUM_MATES, requests_under_way

pytestmark = pytest.mark.cluster

LOAD_S = float(os.environ.get("FAULT_SECONDS", "30"))
RATE_PER_S = 6.0


def test_killed_nodes(start_fleet: Callable[..., Any], tmp_path: Path, report_figure: Callable[[str], None]) -> None:
    """SIGKILL for the node of one of three replicas of `world`, then for that of the only one of `europe`."""
    all_mates: list[int] = []
    with start_fleet() as fleet:
        fleet.scale("world", 3)  # all that have room: one of them is alone on its node
        traffic = Traffic(fleet.url, tmp_path)
        with traffic.load("warm up", 3, 4):  # links come up
            pass
        with traffic.load("SIGKILL nodes, direct calls", RATE_PER_S, LOAD_S) as tally:
            for pool, label in (("world", "large"), ("europe", "small")):
                homes = [fleet.node_of(replica) for replica in fleet.replicas(pool)]
                victim = next(node for node in homes if homes.count(node) == 1)
                dead = {int(replica["Pid"]) for replica in fleet.replicas(pool) if fleet.node_of(replica) is victim}
                with requests_under_way(fleet, pool) as mates:
                    started = time.monotonic()
                    fleet.remove_node(victim, graceful=False)
                    fleet.add_node(label, 1)  # what a cluster's autoscaler would do
                fleet.wait_replaced(pool, dead)
                whole_s = time.monotonic() - started
                tally.event(
                    f"node of 1 of {len(homes)} {pool} replicas killed, whole after {whole_s:.1f} s, "
                    f"{NUM_MATES} requests under way {mates}"
                )
                all_mates += mates
        nothing_lost(tally, report_figure)
        assert all_mates == [200] * NUM_MATES * 2
        page = fleet.request("/metrics")[2].decode()
    lost = set(re.findall(r'lost_replica_calls_total\{[^}]*reason="(\w+)"', page))
    assert "ReplicaGoneError" in lost  # of a direct connection
    calls = re.findall(r'replica_calls_total\{[^}]*result="translated"[^}]*way="(\w+)"[^}]*\} ([0-9.e+]+)', page)
    assert sum(float(count) for way, count in calls if way == "direct") > 0.5 * tally.ok  # handles, while `europe` is away


_MACHINE = "babelephant-dead"
_OURS, _THEIRS = "198.18.77.1", "198.18.77.2"  # of the block for benchmarks, which no network uses
_REPLICA = f"""
import asyncio, json
from tests.app.test_direct_calls import Server, slow
async def serve():
    server = Server("far", slow())
    address = await server.calls.address("far", "{_THEIRS}")
    print(json.dumps([address.port, address.secret]), flush=True)
    await asyncio.sleep(60)
asyncio.run(serve())
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def other_machine() -> Iterator[CallAddress]:
    """A replica behind a cable of its own."""
    try:
        _ip("netns", "add", _MACHINE)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces: needs root and `ip`")
    replica = None
    try:
        _ip("link", "add", "bab-near", "type", "veth", "peer", "name", "bab-far", "netns", _MACHINE)
        _ip("addr", "add", f"{_OURS}/30", "dev", "bab-near")
        _ip("link", "set", "bab-near", "up")
        _ip("-n", _MACHINE, "addr", "add", f"{_THEIRS}/30", "dev", "bab-far")
        _ip("-n", _MACHINE, "link", "set", "bab-far", "up")
        command = ["ip", "netns", "exec", _MACHINE, sys.executable, "-c", _REPLICA]
        replica = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert replica.stdout is not None
        lines = (line for line in replica.stdout if line.startswith("["))
        port, secret = json.loads(next(lines))
        yield CallAddress("far", _THEIRS, port, secret)
    finally:
        if replica is not None:
            replica.kill()
            replica.wait()
        _ip("netns", "del", _MACHINE)  # takes the cable along


class _Handle:
    """Serve's handle, which knows the replica of the other machine and one here."""

    def __init__(self, *servers: Any) -> None:
        self.servers = list(servers)
        self.translate = self

    def broadcast(self, method: str) -> _Handle:
        return self

    async def results_async(self, *, return_exceptions: bool) -> list[CallAddress]:
        return [server if isinstance(server, CallAddress) else await server.address() for server in self.servers]


def test_a_machine_that_falls_silent_loses_no_call(report_figure: Callable[[str], None]) -> None:
    from app.pools import RayPool  # imports Ray, which must not happen before its environment is set
    from tests.app.fakes import Watcher
    from tests.app.test_direct_calls import Server

    async def scenario(address: CallAddress) -> None:
        watcher, near = Watcher(), Server("near")
        handle = _Handle(address)
        pool = RayPool("p", handle, direct=True, watcher=watcher)
        links = pool._links
        assert links is not None
        await links.look()
        calls = [
            asyncio.create_task(pool.translate([TranslationRequest(f"r{i}", "x " * 20, "eng_Latn", "deu_Latn")], 60))
            for i in range(8)
        ]
        await asyncio.sleep(0.05)
        assert watcher.num_open == 8
        _ip("link", "set", "bab-near", "down")  # not a word from there any more, and none to there
        handle.servers = [near]
        await links.look()
        started = time.monotonic()
        replies = await asyncio.gather(*calls)
        took_s = time.monotonic() - started
        assert all(isinstance(reply, Translated) for reply in replies)
        assert watcher.ended == [("p", "direct", "lost")] * 8 + [("p", "direct", "translated")] * 8
        report_figure(f"a machine falls silent with 8 direct calls on it: 8 of 8 answered elsewhere after {took_s:.1f} s")
        near.stop()
        links.close()

    with other_machine() as address:
        asyncio.run(asyncio.wait_for(scenario(address), 50))
