"""What Serve's schema cannot know of serve/production.yaml: its models fit their cards, its settings hold together."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from ray._common.utils import import_attr
from ray.serve.schema import DeploymentSchema

from app.autoscaling.open_calls import scale_by_open_calls
from app.routing import LanguagePair
from app.serve_config import ServeConfigError, load_serve_config
from app.settings import INGRESS_NAME, ServiceSettings
from engine.accounting import plan_memory
from engine.config import ModelConfig
from tests.cluster_configs.folder import CONFIGS, PRODUCTION, load

_54B = ModelConfig.from_dict(json.loads((CONFIGS.parent / "app/cost/data/nllb_moe_54b.json").read_text()))
_CARD_GB = {"large": 80, "small": 24}


@pytest.fixture(scope="module")
def settings() -> ServiceSettings:
    return ServiceSettings.model_validate(load_serve_config(PRODUCTION).applications[0].args)


@pytest.fixture(scope="module")
def deployments() -> dict[str, DeploymentSchema]:
    return {deployment.name: deployment for deployment in load_serve_config(PRODUCTION).applications[0].deployments}


def test_pools_of_the_54b_fit_their_card_with_room_for_activations(settings: ServiceSettings) -> None:
    pools = {name: pool for name, pool in settings.pools.items() if "54b" in pool.model_name}
    assert set(pools) == {"world", "asia"}
    text = PRODUCTION.read_text()
    for name, pool in pools.items():
        plan = plan_memory(_54B, pool.engine_config())
        assert plan.total_bytes < 0.9 * 80e9, name
        weights_gb = (plan.experts_bytes + plan.rest_bytes) / 1e9
        assert f"{weights_gb:.1f} GB weights + {plan.kv_cache_bytes / 1e9:.1f} GB caches" in text  # the table of its head
    assert plan_memory(_54B, pools["world"].engine_config()).total_bytes > 24e9  # why it does not go to `small`


def test_a_checkpoint_is_named_after_its_precision(settings: ServiceSettings) -> None:
    for pool in settings.pools.values():
        assert pool.model_name.endswith(pool.precision)


def test_replica_counts_can_change_without_a_restart(deployments: dict[str, DeploymentSchema]) -> None:
    for name, deployment in deployments.items():
        assert isinstance(deployment.autoscaling_config, dict), name  # switching from num_replicas would restart
        config = deployment.autoscaling_config
        assert config["metrics_interval_s"] >= 1
        assert config["downscale_delay_s"] >= config["look_back_period_s"]
    assert deployments["ingress"].autoscaling_config["min_replicas"] >= 2  # type: ignore[index]


def test_pools_scale_by_what_replicas_say(settings: ServiceSettings, deployments: dict[str, DeploymentSchema]) -> None:
    assert settings.direct_calls
    for name in settings.pools:
        policy = deployments[name].autoscaling_config["policy"]["policy_function"]  # type: ignore[index]
        assert import_attr(policy) is scale_by_open_calls


def test_replicas_drain_longer_than_the_longest_request(
    settings: ServiceSettings, deployments: dict[str, DeploymentSchema]
) -> None:
    for name in (INGRESS_NAME, *settings.pools):
        drain_s = deployments[name].graceful_shutdown_timeout_s
        assert isinstance(drain_s, (int, float)) and drain_s > settings.http.max_timeout_s


def test_one_gpu_a_replica_on_a_node_pool_that_exists(
    settings: ServiceSettings, deployments: dict[str, DeploymentSchema]
) -> None:
    for name in settings.pools:
        options = deployments[name].ray_actor_options
        assert options.num_gpus == 1
        assert (options.label_selector or {}).get("node-pool") in _CARD_GB


@pytest.mark.parametrize(
    ("src_lang", "tgt_lang", "pool"),
    [
        ("eng_Latn", "jpn_Jpan", "asia"),
        ("zho_Hans", "kor_Hang", "asia"),
        ("deu_Latn", "eng_Latn", "europe"),
        ("deu_Latn", "fra_Latn", "world"),
        ("ces_Latn", "pol_Latn", "world"),
    ],
)
def test_pairs_go_where_the_table_says(settings: ServiceSettings, src_lang: str, tgt_lang: str, pool: str) -> None:
    assert settings.router().route(LanguagePair(src_lang, tgt_lang)) == pool


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("label_selector:", "label_selectors:", "label_selectors is not a Serve setting"),
        ("target_ongoing_requests: 32", "target_ongoing_request: 32", "target_ongoing_request"),
        ("max_waiting: 4096", "max_waitin: 4096", "max_waitin"),
        ("graceful_shutdown_timeout_s: 130", "graceful_shutdown_timeouts: 130", "graceful_shutdown_timeouts is not"),
        ("- name: europe", "- name: europa", "'europa' is neither the ingress nor a pool"),
        ("max_replicas: 4", "max_replicas: 0", "max_replicas"),
        ("scale_by_open_calls", "scale_by_calls", "a policy_function is not there"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, old: str, new: str, problem: str) -> None:
    broken = tmp_path / "production.yaml"
    broken.write_text(PRODUCTION.read_text().replace(old, new))
    assert broken.read_text() != PRODUCTION.read_text()
    with pytest.raises(ServeConfigError) as error:
        load_serve_config(broken)
    assert problem in str(error.value)


def test_one_image_and_the_projects_version_everywhere() -> None:
    version = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())["project"]["version"]
    (image,) = load(CONFIGS / "kuberay/base/kustomization.yaml")["images"]
    assert str(image["newTag"]) == version
    for path in (CONFIGS / "launcher").glob("*.yaml"):
        assert load(path)["docker"]["image"] == f"{image['newName']}:{image['newTag']}"


def test_every_serve_yaml_of_the_folder_is_a_serve_config() -> None:
    for path in (CONFIGS / "serve").glob("*.yaml"):
        assert "applications" in load(path), f"{path}: the Serve tests read every *.yaml here; call other files *.yml"
