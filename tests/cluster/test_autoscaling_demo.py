"""local-autoscaling.yaml with the demonstration model itself: grows under load, shrinks after it, and its log replays.

The clock is scaled so that the way down takes seconds; everything else is the file's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from app.local_cluster import free_ports
from tests.cluster.autoscaling_service import Service
from tests.cluster.fleet import REPOSITORY, wait_until

pytestmark = pytest.mark.cluster

SCALE = 20  # the policy's seconds in a real one
CAPACITY_PER_S = 10.0  # far below what the model can do: the load of the test must fit two busy cores


def test_the_demonstration_model_scales(ray_environment: str, tmp_path: Path, report_figure: Callable[[str], None]) -> None:
    raw = yaml.safe_load((REPOSITORY / "cluster_configs/serve/local-autoscaling.yaml").read_text())
    raw["http_options"]["port"] = free_ports(1)[0]
    (application,) = raw["applications"]
    policy = application["autoscaling_policy"]["policy_kwargs"]
    policy |= {"log_path": str(tmp_path / "decisions.jsonl"), "clock_scale": SCALE, "interval_s": 20, "idle_s": 200}
    policy |= {"warm_up_s": 100, "hold_s": 200, "stale_after_s": 5.0}
    for pool in policy["pools"].values():
        pool["capacity_per_s"] = CAPACITY_PER_S
    service = Service(raw, tmp_path, num_gpus=0)
    try:
        begin = time.time()
        with service.load("main", 14, texts_per_request=7) as answers:
            wait_until(lambda: service.running("main") == 2, 60, "no second replica")
            up_s = time.time() - begin
            time.sleep(4)
            shown = service.status()["main"]
        quiet = time.time()
        wait_until(lambda: service.running("main") == 1, 60, "no way down")
        down_s = time.time() - quiet
        decisions = service.decisions("main")
    finally:
        service.shutdown()
    from app.autoscaling.decision_log import verify

    verdict = verify(service.log_path)
    report_figure(
        f"demonstration model 1 -> 2 in {up_s:.1f} s of load, 2 -> 1 {down_s:.1f} s after it (idle_s = 10 s); answers "
        f"{dict(answers)}; {len(shown['replicas'])} replicas shown, {shown['autoscaling']}; "
        f"{verdict.num_decisions} decisions replay equal"
    )
    assert set(answers) == {"200"}
    assert max(decision["target"] for decision in decisions) == 2
    assert verdict.num_decisions > 10
    assert verdict.num_different == 0
