"""Capacity from a profile, on the demonstration model: texts longer than the settings expect ask for another replica.

The profile is made up, slow enough for the load to fit two busy cores; lengths are those that real replicas count.
"""

from __future__ import annotations

import json
import math
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
TEXT = "The file could not be saved because the disk is full."
PER_S = 8.0


class LongTexts(Service):
    """Asks for TEXT instead of a word."""

    def translate(self, pool: str, num_texts: int) -> str:
        body = {"source_lang": "en", "target_lang": "de", "texts": [TEXT] * num_texts, "timeout_s": 60}
        return str(self.request("POST", "/v1/translate", body)[0])


def test_longer_texts_than_expected_ask_for_more(
    ray_environment: str, tmp_path: Path, report_figure: Callable[[str], None]
) -> None:
    from app.autoscaling.decision_log import verify
    from app.cost.lengths import PairLengths
    from app.cost.profile import Birth, Profile

    path, lengths_path = tmp_path / "profile.json", tmp_path / "lengths.json"
    made = Profile("d", "m", "w8a16", 4, False, 0.0, 1e-5, 0.0, 0.01, 1e-3, 10.0, 1e9, 32, Birth("", "", "", "made"), {})
    made.save(path)
    expected = made.capacity_per_s(6, 7, 2.0)
    raw = yaml.safe_load((REPOSITORY / "cluster_configs/serve/local-autoscaling.yaml").read_text())
    raw["http_options"]["port"] = free_ports(1)[0]
    policy = raw["applications"][0]["autoscaling_policy"]["policy_kwargs"]
    policy |= {"log_path": str(tmp_path / "decisions.jsonl"), "clock_scale": SCALE, "interval_s": 20, "idle_s": 200}
    policy |= {"warm_up_s": 100, "hold_s": 200, "stale_after_s": 5.0, "lengths_path": str(lengths_path)}
    policy["pools"]["main"] = {
        "profile": str(path), "slo_s": 2.0, "source_tokens": 6, "target_tokens": 7, "startup_s": 10, "usd_per_hour": 0.1
    }  # fmt: skip
    service = LongTexts(raw, tmp_path, num_gpus=0)
    try:
        seen = json.loads(
            service.request("POST", "/v1/translate", {"source_lang": "en", "target_lang": "de", "texts": [TEXT]})[1]
        )["translations"][0]
        real = made.capacity_per_s(seen["source_tokens"], seen["target_tokens"], 2.0)
        assert real < PER_S < 0.5 * expected  # by the start's lengths one replica would do
        begin = time.time()
        with service.load("main", PER_S, texts_per_request=4) as answers:
            wait_until(lambda: service.running("main") >= math.ceil(PER_S / real), 90, "no more replicas")
            up_s = time.time() - begin
            time.sleep(4)
        capacities = [record["capacity"] * SCALE for record in service.decisions("main")]
    finally:
        service.shutdown()
    verdict = verify(service.log_path)
    found = PairLengths.load(lengths_path).estimate("eng_Latn-deu_Latn")
    report_figure(
        f"capacity by a profile {capacities[0]:.1f} -> {capacities[-1]:.1f}/s (of the text itself {real:.1f}), one more "
        f"replica after {up_s:.1f} s; learnt {found.fertility:.3f} tokens a character, ratio {found.length_ratio:.3f}; "
        f"{dict(answers)}; {verdict.num_decisions} decisions replay equal"
    )
    assert set(answers) == {"200"}
    assert capacities[0] == pytest.approx(expected)
    assert capacities[-1] == pytest.approx(real, rel=0.1)
    assert found.tokens(len(TEXT)) == pytest.approx((seen["source_tokens"], seen["target_tokens"]), rel=0.02)
    assert verdict.num_different == 0
