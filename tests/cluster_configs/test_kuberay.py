"""Every kustomize overlay, rendered and checked. No Kubernetes runs here: what a cluster does with it is not tested."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from app.serve_config import load_serve_config
from tests.cluster_configs.folder import CONFIGS, PRODUCTION, load
from tests.cluster_configs.kubernetes_objects import check, groups, objects, ray_service, render

KUBERAY = CONFIGS / "kuberay"
OVERLAYS = sorted(path for path in (KUBERAY / "overlays").iterdir())
COMPONENTS = sorted(path for path in (KUBERAY / "components").iterdir())
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


@each_overlay
def test_every_object_is_valid(overlay: Path) -> None:
    kinds = [item["kind"] for item in objects(overlay)]
    assert {"Namespace", "RayService", "PodDisruptionBudget", "NetworkPolicy"} <= set(kinds)
    for item in objects(overlay):
        check(item)
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "babelephant"


@each_overlay
def test_the_serve_config_is_the_production_file_and_nothing_else(overlay: Path, tmp_path: Path) -> None:
    text = ray_service(overlay)["spec"]["serveConfigV2"]
    assert text == PRODUCTION.read_text()
    taken_out = tmp_path / "serve.yaml"
    taken_out.write_text(text)
    assert load_serve_config(taken_out) == load_serve_config(PRODUCTION)
    assert "ConfigMap" not in [item["kind"] for item in objects(overlay)]


@each_overlay
def test_ray_reads_gpus_and_labels_of_the_worker_groups(overlay: Path) -> None:
    service = ray_service(overlay)
    cluster = {"metadata": {"name": "x", "namespace": "x"}, "spec": service["spec"]["rayClusterConfig"]}
    node_types = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(cluster))["available_node_types"]
    wanted = {
        deployment["ray_actor_options"]["label_selector"]["node-pool"]
        for deployment in load(PRODUCTION)["applications"][0]["deployments"]
        if "ray_actor_options" in deployment
    }
    for pool in wanted:
        assert node_types[pool]["resources"]["GPU"] == 1
        assert node_types[pool]["labels"]["node-pool"] == pool
    head = next(node_type for name, node_type in node_types.items() if name not in wanted)
    assert head["resources"].get("GPU", 0) == head["resources"]["CPU"] == 0
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__


@each_overlay
def test_machines_hold_the_smallest_fleet(overlay: Path) -> None:
    deployments = load(PRODUCTION)["applications"][0]["deployments"]
    for group in groups(ray_service(overlay))[1:]:
        smallest = [
            d["autoscaling_config"]["min_replicas"]
            for d in deployments
            if d.get("ray_actor_options", {}).get("label_selector", {}).get("node-pool") == group["groupName"]
        ]
        assert sum(smallest) <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


@each_overlay
def test_pods_are_what_a_restricted_namespace_wants(overlay: Path) -> None:
    for group in groups(ray_service(overlay)):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["image"].rpartition(":")[2] not in ("", "latest", container["image"])
            assert not any("value" in e and "TOKEN" in e["name"] for e in container.get("env", ()))
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod["volumes"]}


@each_overlay
def test_the_cluster_asks_for_a_token(overlay: Path) -> None:
    assert ray_service(overlay)["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_workers_outlive_their_replicas_drain() -> None:
    deployments = load(PRODUCTION)["applications"][0]["deployments"]
    drain_s = max(d.get("graceful_shutdown_timeout_s", 0) for d in deployments)
    for group in groups(ray_service(KUBERAY / "base"))[1:]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s


@each_overlay
def test_one_worker_at_a_time_may_be_drained(overlay: Path) -> None:
    (budget,) = [item["spec"] for item in objects(overlay) if item["kind"] == "PodDisruptionBudget"]
    workers = groups(ray_service(overlay))[1:]
    assert budget["minAvailable"] == sum(group["minReplicas"] for group in workers) - 1
    for group in workers:
        assert budget["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()


def test_every_component_is_used_by_an_overlay() -> None:
    used = {Path(name).name for overlay in OVERLAYS for name in load(overlay / "kustomization.yaml")["components"]}
    assert used == {component.name for component in COMPONENTS}


def test_overlays_differ_as_they_say() -> None:
    services = {overlay.name: ray_service(overlay)["spec"] for overlay in OVERLAYS}
    assert {name: s["upgradeStrategy"]["type"] for name, s in services.items()} == {
        "h100": "NewCluster",
        "a100": "NewClusterWithIncrementalUpgrade",
        "fixed": "None",
    }
    large = {name: s["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"] for name, s in services.items()}
    assert {name: spec["nodeSelector"]["nvidia.com/gpu.product"] for name, spec in large.items()} == {
        "h100": "NVIDIA-H100-80GB-HBM3",
        "a100": "NVIDIA-A100-SXM4-80GB",
        "fixed": "NVIDIA-H100-80GB-HBM3",
    }
    assert [c["name"] for c in large["h100"]["initContainers"]] == ["fetch-models"]
    assert large["a100"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert "models" not in [volume["name"] for volume in large["fixed"]["volumes"]]
    assert [name for name, s in services.items() if "gcsFaultToleranceOptions" in s["rayClusterConfig"]] == ["a100", "h100"]
    assert [name for name, s in services.items() if s["rayClusterConfig"].get("enableInTreeAutoscaling")] == ["a100", "h100"]


def test_the_object_store_brings_what_the_pools_load() -> None:
    brought = {
        argument.removeprefix("--include=/").removesuffix("/**")
        for group in groups(ray_service(KUBERAY / "overlays/h100"))[1:]
        for container in group["template"]["spec"]["initContainers"]
        for argument in container["args"]
        if argument.startswith("--include=")
    }
    pools = load(PRODUCTION)["applications"][0]["args"]["pools"].values()
    assert brought == {Path(pool["checkpoint"]).name for pool in pools}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["spec"].update(serveConfig="x"), "serveConfig"),
        (lambda s: s["spec"]["rayClusterConfig"].update(enableInTreeAutoscalling=True), "enableInTreeAutoscalling"),
        (lambda s: s["spec"]["upgradeStrategy"].update(type="Rolling"), "Rolling"),
        (lambda s: s["spec"].update(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}), "clusterUpgradeOptions"),
        (lambda s: groups(s)[1].update(maxReplica=3), "maxReplica"),
        (lambda s: groups(s)[0]["rayStartParams"].update({"num-cpus": 0}), "0 is not of type 'string'"),
        (lambda s: groups(s)[1]["template"]["spec"].update(nodeSelectors={}), "nodeSelectors"),
        (lambda s: groups(s)[1]["template"]["spec"]["containers"][0].update(volumeMount=[]), "volumeMount"),
        (
            lambda s: s["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"].update(redisPassword={"value": "x"}),
            "valueFrom",
        ),
    ],
)
def test_mistakes_in_the_ray_service_are_refused(change: Callable[[Any], object], message: str) -> None:
    service = copy.deepcopy(ray_service(KUBERAY / "overlays/h100"))
    check(service)
    change(service)
    with pytest.raises(jsonschema.ValidationError) as error:
        check(service)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("NetworkPolicy", lambda o: o["spec"].update(policyType=["Ingress"]), "policyType"),
        ("StatefulSet", lambda o: o["spec"].update(replicas="1"), "replicas|integer|'1'"),
        ("PodDisruptionBudget", lambda o: o["spec"].update(maxUnavailabel=1), "maxUnavailabel"),
    ],
)
def test_mistakes_in_core_kinds_are_refused(kind: str, change: Callable[[Any], object], message: str) -> None:
    item = copy.deepcopy(next(item for item in objects(KUBERAY / "overlays/h100") if item["kind"] == kind))
    change(item)
    with pytest.raises(jsonschema.ValidationError) as error:
        check(item)
    assert any(word in str(error.value) for word in message.split("|"))


def test_a_patch_on_a_group_that_moved_is_refused_by_kustomize(tmp_path: Path) -> None:
    base = load(KUBERAY / "base/rayservice.yaml")
    base["spec"]["rayClusterConfig"]["workerGroupSpecs"].reverse()
    (tmp_path / "rayservice.yaml").write_text(yaml.safe_dump(base))
    for component in ("gpu-h100", "models-object-store"):
        folder = tmp_path / component
        folder.mkdir()
        for source in (KUBERAY / "components" / component).iterdir():
            (folder / source.name).write_text(source.read_text())
        (tmp_path / "kustomization.yaml").write_text(f"resources: [rayservice.yaml]\ncomponents: [{component}]\n")
        render.cache_clear()
        with pytest.raises(subprocess.CalledProcessError) as error:
            render(tmp_path)
        assert "testing value" in error.value.stderr or "test failed" in error.value.stderr
