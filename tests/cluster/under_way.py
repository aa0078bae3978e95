"""Requests that the engines hold at a chosen moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.cluster.fleet import Fleet, wait_until

NUM_MATES = 4
SENTENCES = ["Your changes have been saved.", "The password is too short."] * 6
TARGET_OF_POOL = {"world": "ru", "europe": "de"}


def num_running(fleet: Fleet, pool: str) -> int:
    pools = {entry["name"]: entry["replicas"] for entry in json.loads(fleet.request("/v1/status")[2])["pools"]}
    return sum(int(replica["num_running"]) for replica in pools[pool])


@contextmanager
def requests_under_way(fleet: Fleet, pool: str) -> Iterator[list[int]]:
    """Requests of many sentences that the engines hold, waiting and running, when the block starts; then their statuses."""
    body = {"source_lang": "en", "target_lang": TARGET_OF_POOL[pool], "texts": SENTENCES}
    statuses: list[int] = []
    with ThreadPoolExecutor(NUM_MATES) as clients:
        answers = [clients.submit(fleet.request, "/v1/translate", body) for _ in range(NUM_MATES)]
        wait_until(lambda: num_running(fleet, pool) > 0, 20, "nothing under way")
        yield statuses
        statuses += [answer.result()[0] for answer in answers]
