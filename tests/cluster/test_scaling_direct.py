"""production.yaml scales its pools by the calls that replicas hold, which go past Serve: up under load, then down."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.autoscaling.open_calls import POLICY_PATH
from tests.cluster.fleet import Fleet, wait_until
from tests.cluster.under_way import SENTENCES

pytestmark = pytest.mark.cluster

NUM_CLIENTS = 6


def test_a_pool_grows_and_shrinks_with_direct_calls(
    start_fleet: Callable[..., Any], tmp_path: Path, report_figure: Callable[[str], None]
) -> None:
    with start_fleet() as fleet:
        (world,) = [d for d in fleet.raw["applications"][0]["deployments"] if d["name"] == "world"]
        assert world["autoscaling_config"]["policy"] == {"policy_function": POLICY_PATH}
        world["autoscaling_config"] |= {"max_replicas": 2, "target_ongoing_requests": 4, "look_back_period_s": 3}
        fleet.deploy(fleet.raw)
        time.sleep(15)
        assert num_replicas(fleet) == 1  # nobody calls
        statuses: Counter[str] = Counter()
        begin = time.monotonic()
        up_s = 0.0

        def client(number: int) -> None:
            while time.monotonic() < begin + 60 and not (up_s and time.monotonic() > begin + up_s + 8):
                body = {"source_lang": "en", "target_lang": "ru", "texts": SENTENCES[:8]}
                status, _, answer = fleet.request("/v1/translate", body)
                statuses[f"{status} {json.loads(answer).get('error', {}).get('code', '')}"] += 1

        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            futures = [clients.submit(client, number) for number in range(NUM_CLIENTS)]  # 6 open calls, 4 a replica
            wait_until(lambda: num_replicas(fleet) == 2, 55, "the pool does not grow")
            up_s = time.monotonic() - begin
            for future in futures:
                future.result()
        begin = time.monotonic()
        wait_until(lambda: num_replicas(fleet) == 1, 60, "the pool does not shrink")
        report_figure(
            f"scaling on direct calls, {NUM_CLIENTS} clients without pause, 4 open calls a replica wanted: 1 -> 2 after "
            f"{up_s:.1f} s, 2 -> 1 {time.monotonic() - begin:.1f} s after the load; answers {dict(statuses)}"
        )
        assert set(statuses) == {"200 "}
        page = fleet.request("/metrics")[2].decode()
        assert 'way="direct"' in page


def num_replicas(fleet: Fleet) -> int:
    return len(fleet.replicas("world"))
