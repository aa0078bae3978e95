"""An open-loop soak at 70 % of a measured knee while the fleet is scaled up, loses a node and is scaled down.

SOAK_SECONDS sets the length (default 60).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.traffic import Traffic

pytestmark = pytest.mark.cluster

SOAK_S = float(os.environ.get("SOAK_SECONDS", "60"))
SHARE_OF_KNEE = 0.7


def test_soak(start_fleet: Callable[..., Any], tmp_path: Path, report_figure: Callable[[str], None]) -> None:
    with start_fleet() as fleet:
        traffic = Traffic(fleet.url, tmp_path)
        with traffic.load("warm up", 3, 8):
            pass
        knee = traffic.knee()
        with traffic.load("soak", SHARE_OF_KNEE * knee, SOAK_S) as tally:
            begin = time.monotonic()
            tally.event(f"knee {knee:.3g}/s with 1 replica a pool, Serve's Python proxy, HeadOnly")

            time.sleep(0.1 * SOAK_S)
            tally.event(f"world 1 -> 2 at {time.monotonic() - begin:.0f} s, took {fleet.scale('world', 2):.1f} s")

            time.sleep(max(0.0, 0.35 * SOAK_S - (time.monotonic() - begin)))
            killed_at = time.monotonic()
            victim = fleet.node_of(fleet.replicas("world")[0])
            dead = {replica["Pid"] for replica in fleet.replicas("world") if fleet.node_of(replica) is victim}
            fleet.remove_node(victim, graceful=False)
            fleet.add_node("large", 2)  # what a cluster's autoscaler would do
            fleet.wait_replaced("world", dead)
            whole_s = time.monotonic() - killed_at
            at = killed_at - begin
            tally.event(f"node with {len(dead)} of 2 world replicas killed at {at:.0f} s, whole after {whole_s:.1f} s")

            time.sleep(max(0.0, 0.7 * SOAK_S - (time.monotonic() - begin)))
            at = time.monotonic() - begin
            tally.event(f"world 2 -> 1 at {at:.0f} s, took {fleet.scale('world', 1):.1f} s")
        report_figure(str(tally))
    assert tally.sent > 0.5 * SOAK_S * SHARE_OF_KNEE * knee
    assert (tally.lost, tally.client_error) == (0, 0), str(tally)
    assert tally.ok + tally.refused == tally.sent
