"""One fake cluster a test file, gone without a trace afterwards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.local_cluster import free_ports, prepare_environment
from tests.cluster.fleet import REPOSITORY, Fleet, production_variant


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> Iterator[str]:
    """A token drawn for this session: Ray reads it once per process, so all clusters of the session share it."""
    assert "ray" not in sys.modules, "Ray reads its environment when imported: run `pytest -m cluster tests/cluster` alone"
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("RAY_", "BABELEPHANT_"))]:
        del os.environ[name]
    prepare_environment(proxy="python")
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    yield os.environ["RAY_AUTH_TOKEN"]
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def start_fleet(
    ray_environment: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AbstractContextManager[Fleet]]:
    """`with start_fleet(import_path=...) as fleet`. Fails when a process of the cluster outlives it."""

    @contextmanager
    def start(*, patient: bool = False, **variant: Any) -> Iterator[Fleet]:
        (port,) = free_ports(1)
        fleet = Fleet(tmp_path_factory.mktemp("fleet"), production_variant(port, **variant), patient=patient)
        try:
            yield fleet
        finally:
            fleet.shutdown()
        give_up = time.monotonic() + 60
        while left := _processes_with(ray_environment):
            assert time.monotonic() < give_up, f"processes of the cluster are still there: {left}"
            time.sleep(0.5)

    return start


def _processes_with(token: str) -> dict[int, str]:
    """Processes that were started with our token in their environment: those of our clusters."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found
