"""Launcher files with Ray's own validator, which refuses unknown keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster_configs.folder import CONFIGS, PRODUCTION, load

FILES = sorted((CONFIGS / "launcher").glob("*.yaml"))
_SHARED_KEYS = (
    "cluster_name", "docker", "file_mounts", "head_node_type", "head_start_ray_commands", "idle_timeout_minutes",
    "upscaling_speed", "worker_start_ray_commands",
)  # fmt: skip


def validate(config: Any) -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_there_is_one_for_each_cloud() -> None:
    assert [path.stem for path in FILES] == ["aws", "azure", "gcp"]
    assert [load(path)["provider"]["type"] for path in FILES] == ["aws", "azure", "gcp"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rays_validator_accepts(path: Any) -> None:
    prepared = validate(load(path))
    assert {"head", "large", "small"} <= set(prepared["available_node_types"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(max_worker=3), "max_worker"),
        (lambda c: c["docker"].update(imge="x"), "imge"),
        (lambda c: c["available_node_types"]["large"].update(label={"node-pool": "large"}), "label"),
        (lambda c: c.update(head_node_type="haed"), "head_node_type"),
        (lambda c: c.update(max_workers=1), "smaller than the sum"),
        (lambda c: c["available_node_types"]["small"].pop("resources"), "resources"),
    ],
)
def test_mistakes_are_refused(path: Any, change: Callable[[Any], object], message: str) -> None:
    config = load(path)
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)) as error:
        validate(config)
    assert message in " ".join(str(error.value).split())


def test_they_differ_only_in_what_the_cloud_decides() -> None:
    first, *others = map(load, FILES)
    for other in others:
        for key in _SHARED_KEYS:
            assert other[key] == first[key], key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_machines_hold_the_production_fleet(path: Any) -> None:
    config = load(path)
    deployments = load(PRODUCTION)["applications"][0]["deployments"]
    for pool_label in ("large", "small"):
        replicas = [
            deployment["autoscaling_config"]
            for deployment in deployments
            if deployment.get("ray_actor_options", {}).get("label_selector") == {"node-pool": pool_label}
        ]
        assert replicas
        (node_type,) = [t for t in config["available_node_types"].values() if t.get("labels") == {"node-pool": pool_label}]
        gpus = node_type["resources"]["GPU"]
        assert gpus * node_type["min_workers"] >= sum(r["min_replicas"] for r in replicas)
        assert node_type["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_private_and_nothing_open(path: Any) -> None:
    config = load(path)
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in path.read_text()
    assert "--metrics-export-port=8080" in head and "--metrics-export-port=8080" in worker
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "AKIA" not in path.read_text()
