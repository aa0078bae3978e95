"""Renders the kustomize folders and checks what comes out: core kinds and pod templates against Kubernetes' own schema."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster_configs.folder import load, tool

KUBERNETES_VERSION = "1.33"
kubernetes_validate: Any = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed here")
_RAY_SERVICE = load(Path(__file__).with_name("rayservice.schema.yaml"))


@functools.cache
def render(folder: Path) -> str:
    """The YAML that `kubectl apply -k` would send; raises CalledProcessError where kustomize refuses."""
    command = [tool("kubectl"), "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def objects(folder: Path) -> list[dict[str, Any]]:
    """The objects of `render`."""
    return list(yaml.safe_load_all(render(folder)))


def ray_service(folder: Path) -> dict[str, Any]:
    """The one RayService among them."""
    (found,) = [item for item in objects(folder) if item["kind"] == "RayService"]
    return found


def groups(service: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Head group, then the worker groups."""
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def check(item: Mapping[str, Any]) -> None:
    """Raises jsonschema.ValidationError for a key that nobody knows, a wrong type or a missing field."""
    if item["kind"] != "RayService":
        kubernetes_validate.validate(dict(item), KUBERNETES_VERSION, strict=True)
        return
    jsonschema.validate(item, _RAY_SERVICE, cls=jsonschema.Draft202012Validator)
    for group in groups(item):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(template, KUBERNETES_VERSION, strict=True)
