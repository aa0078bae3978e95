from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.autoscaling.open_calls import POLICY_PATH
from app.serve import build_app
from app.serve_config import ServeConfigError, load_serve_config
from app.settings import ServiceSettings

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "cluster_configs/serve").glob("*.yaml"))


def changed(tmp_path: Path, change: Any, name: str = "local-gpu.yaml") -> Path:
    (source,) = [path for path in CONFIGS if path.name == name]
    raw = yaml.safe_load(source.read_text())
    change(raw, raw["applications"][0], {d["name"]: d for d in raw["applications"][0]["deployments"]})
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {"local-cpu.yaml", "local-gpu.yaml", "two-pools.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_build(path: Path) -> None:
    config = load_serve_config(path, host="0.0.0.0", port=1234)
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 1234)
    (application,) = config.applications
    settings = ServiceSettings.model_validate(application.args)
    assert {d.name for d in application.deployments} == {"ingress", *settings.pools}
    build_app(settings)
    for deployment in application.deployments:
        device = settings.pools[deployment.name].device if deployment.name in settings.pools else "cpu"
        options = deployment.ray_actor_options.model_dump() if deployment.name != "ingress" else {"num_cpus": 0}
        assert options["num_cpus"] == 0  # the default of 1 per replica never fits a small machine
        assert bool(options.get("num_gpus")) == (device == "cuda")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw, app, deployments: raw.update(http_option={}), "http_option is not a Serve setting"),
        (lambda raw, app, deployments: deployments["demo"].update(max_ongoing_request=5), "max_ongoing_request is not"),
        (lambda raw, app, deployments: deployments["demo"]["autoscaling_config"].update(mim_replicas=1), "mim_replicas"),
        (lambda raw, app, deployments: deployments["demo"]["autoscaling_config"].update(max_replicas=0), "max_replicas"),
        (lambda raw, app, deployments: deployments["demo"].update(name="dmeo"), "'dmeo' is neither the ingress nor a pool"),
        (lambda raw, app, deployments: deployments["demo"].update(user_config={"stuck": 1}), "stuck"),
        (lambda raw, app, deployments: app["args"]["pools"]["demo"].update(precison="bf16"), "precison"),
        (
            lambda raw, app, deployments: (
                app["args"].update(direct_calls=True),
                deployments["demo"]["autoscaling_config"].update(max_replicas=2),
            ),
            "pool 'demo' is scaled by Serve's own count of calls, which args.direct_calls: true hides",
        ),
        (
            lambda raw, app, deployments: deployments["demo"]["autoscaling_config"].update(
                policy={"policy_function": POLICY_PATH + "s"}
            ),
            "a policy_function is not there: module 'app.autoscaling.open_calls' has no attribute 'scale_by_open_callss'",
        ),
        (
            lambda raw, app, deployments: (
                app["args"].update(direct_calls=True),
                deployments["demo"]["autoscaling_config"].update(
                    max_replicas=2, policy={"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"}
                ),
            ),
            "autoscaling_config.policy app.autoscaling.open_calls:scale_by_open_calls",
        ),
    ],
)
def test_mistakes_are_found_before_ray_starts(tmp_path: Path, change: Any, problem: str) -> None:
    with pytest.raises(ServeConfigError) as error:
        load_serve_config(changed(tmp_path, change))
    assert problem in str(error.value)
    assert "pydantic" not in str(error.value)
    assert "\n" not in str(error.value)


def test_direct_calls_and_a_pool_that_scales_by_what_its_replicas_say(tmp_path: Path) -> None:
    def change(raw: Any, app: Any, deployments: Any) -> None:
        app["args"].update(direct_calls=True)
        deployments["demo"]["autoscaling_config"].update(max_replicas=2, policy={"policy_function": POLICY_PATH})

    load_serve_config(changed(tmp_path, change))


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_a_port_that_cannot_be(port: int) -> None:
    with pytest.raises(ServeConfigError, match=f"port {port} is none; choose 1024 to 65535"):
        load_serve_config(CONFIGS[0], port=port)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match="does not exist"):
        load_serve_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ServeConfigError, match="not valid YAML"):
        load_serve_config(tmp_path / "broken.yaml")
