from __future__ import annotations

import importlib
from typing import Any

import pytest
from pydantic import ValidationError

from app.autoscaling.settings import POLICY_PATH, AutoscalingSettings

GOOD: dict[str, Any] = {"pools": {"a": {"capacity_per_s": 5, "startup_s": 60, "usd_per_hour": 2}}}


def test_the_policys_path_is_a_class_that_serve_can_import() -> None:
    module, _, name = POLICY_PATH.partition(":")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_defaults_decide_every_ten_seconds() -> None:
    settings = AutoscalingSettings.model_validate(GOOD)
    assert (settings.period_s, settings.policy().options.interval_s) == (10.0, 10)
    scaled = AutoscalingSettings.model_validate({**GOOD, "clock_scale": 20})
    assert scaled.period_s == 0.5
    assert scaled.policy().pools[0].capacity_per_s == 0.25  # per second of the policy's clock


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pools": {}}, "pools"),
        ({"pools": {"a": {"capacity_per_s": 0, "startup_s": 1}}}, "capacity_per_s"),
        ({"pools": {"a": {"capacity_per_s": float("nan"), "startup_s": 1}}}, "capacity_per_s"),
        ({"pools": {"a": {"capacity_per_s": 5}}}, "startup_s"),
        ({"pools": {"a": {"startup_s": 1}}}, "capacity_per_s or profile"),
        ({"pools": {"a": {"startup_s": 1, "capacity_per_s": 5, "profile": "p.json"}}}, "one of them"),
        ({"pools": {"a": {"startup_s": 1, "profile": "p.json", "source_tokens": 9}}}, "target_tokens"),
        ({"intervall_s": 10}, "intervall_s"),
        ({"interval_s": 700}, "idle_s"),
        ({"max_step_usd_per_hour": 1.0}, "usd_per_hour"),
        ({"forest_share": 2}, "forest_share"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        AutoscalingSettings.model_validate({**GOOD, **change})
