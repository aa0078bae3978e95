"""From a plan to the Serve config that it implies: replicas of each pool, and their price.

The plan file is the fleet of app.cost.plan as JSON, read strictly:

    {"format": "babelephant-plan-1", "lines": [
      {"pool": "world", "gpu": "H100", "purchase": "on_demand", "replicas": 3, "usd_per_hour": 2.99,
       "capacity_per_s": 41.5, "estimated": false, "why": "peak"}]}

`usd_per_hour` is the price of one replica, `capacity_per_s` sentences per second of one replica.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cost.plan import Plan
from app.invalid_fields import invalid_fields
from app.serve_config import OUR_IMPORT_PATH, check_serve_config
from app.settings import INGRESS_NAME

FORMAT: Literal["babelephant-plan-1"] = "babelephant-plan-1"


class DeploymentError(ValueError):
    """A plan that cannot be deployed with this Serve config; the message says why and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeploymentLine(_Strict):
    """`replicas` of one GPU type for one pool; usd_per_hour and capacity_per_s of one of them."""

    pool: Annotated[str, Field(min_length=1)]
    gpu: Annotated[str, Field(min_length=1)]
    purchase: Literal["on_demand", "spot"]
    replicas: Annotated[int, Field(ge=1)]
    usd_per_hour: Annotated[float, Field(ge=0)]
    capacity_per_s: Annotated[float, Field(gt=0)]
    estimated: bool
    why: str


class DeploymentPlan(_Strict):
    """The plan file."""

    format: Literal["babelephant-plan-1"]
    lines: Annotated[tuple[DeploymentLine, ...], Field(min_length=1)]

    @classmethod
    def from_plan(cls, plan: Plan) -> DeploymentPlan:
        """What a plan says about deployments."""
        lines = [
            DeploymentLine(
                pool=line.pool.name,
                gpu=line.offer.gpu,
                purchase=line.offer.purchase,
                replicas=line.replicas,
                usd_per_hour=line.offer.usd_per_hour,
                capacity_per_s=line.capacity_per_s,
                estimated=line.estimated,
                why=line.why,
            )
            for line in plan.lines
        ]
        return cls(format=FORMAT, lines=tuple(lines))

    @classmethod
    def read(cls, path: Path) -> DeploymentPlan:
        """Read a plan file. Raises DeploymentError naming the file and the place."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DeploymentError(f"{path} does not exist; write one with: babelephant plan POOLS --json {path}") from None
        except ValidationError as error:
            raise DeploymentError(f"{path} is not a plan file ({FORMAT}): {invalid_fields(error)}") from error

    def by_pool(self) -> dict[str, list[DeploymentLine]]:
        """Lines of each pool, in the order of the file."""
        pools: dict[str, list[DeploymentLine]] = {}
        for line in self.lines:
            pools.setdefault(line.pool, []).append(line)
        return pools


def planned_config(raw: Mapping[str, Any], plan: DeploymentPlan, *, keep_minimum: bool = False) -> dict[str, Any]:
    """The Serve config `raw` with the plan's replica counts and prices, checked; `raw` stays as it is.

    min_replicas == max_replicas, or with keep_minimum only max_replicas, for a fleet that an autoscaling policy moves.
    Raises DeploymentError for a pool that the config lacks, that the plan forgets or spreads over several GPU types, and
    ServeConfigError.
    """
    config: dict[str, Any] = copy.deepcopy(dict(raw))
    check_serve_config(config, "the config before the plan")
    deployments = _pool_deployments(config)
    pools = plan.by_pool()
    if unknown := sorted(set(pools) - set(deployments)):
        raise DeploymentError(
            f"the plan has pools {', '.join(unknown)}, the config has {', '.join(sorted(deployments))}: use the same names"
        )
    if forgotten := sorted(set(deployments) - set(pools)):
        raise DeploymentError(f"the plan says nothing about pools {', '.join(forgotten)}; plan them too")
    for name, lines in pools.items():
        _apply(deployments[name], name, lines, keep_minimum=keep_minimum)
    check_serve_config(config, "the config after the plan")
    return config


def _pool_deployments(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Deployments of the pools; a pool without an entry under `deployments:` gets one."""
    ours = [application for application in config["applications"] if application.get("import_path") == OUR_IMPORT_PATH]
    if len(ours) != 1:
        raise DeploymentError(f"{len(ours)} applications of the config have import_path {OUR_IMPORT_PATH}; it must be one")
    entries = ours[0].setdefault("deployments", [])
    known = {entry["name"] for entry in entries}
    entries += [{"name": pool} for pool in ours[0]["args"]["pools"] if pool not in known]
    return {entry["name"]: entry for entry in entries if entry["name"] != INGRESS_NAME}


def _apply(deployment: dict[str, Any], name: str, lines: Sequence[DeploymentLine], *, keep_minimum: bool) -> None:
    if len(kinds := sorted({line.gpu for line in lines})) > 1:
        raise DeploymentError(
            f"pool {name} is planned on {', '.join(kinds)}: the replicas of a deployment are all alike; plan with one "
            "--gpu, or make a pool of each"
        )
    if "num_replicas" in deployment:
        raise DeploymentError(
            f"deployment {name} has num_replicas: changing to a planned count would restart every replica; write "
            "autoscaling_config with min_replicas and max_replicas"
        )
    replicas = sum(line.replicas for line in lines)
    scaling = deployment["autoscaling_config"] = dict(deployment.get("autoscaling_config") or {})
    if keep_minimum:
        scaling["min_replicas"] = min(replicas, int(scaling.get("min_replicas", 1)))
    else:
        scaling["min_replicas"] = replicas
    scaling["max_replicas"] = replicas
    # Serve's default starts with min_replicas; an initial count of another plan would be outside the new bounds.
    scaling.pop("initial_replicas", None)
    price = sum(line.replicas * line.usd_per_hour for line in lines) / replicas
    deployment["user_config"] = {**(deployment.get("user_config") or {}), "usd_per_hour": round(price, 4)}


def as_yaml(config: Mapping[str, Any]) -> str:
    """The config as a file: Serve's order of keys kept, no anchors, so that two of them can be compared line by line."""
    dumper = yaml.SafeDumper
    plain = type("PlainDumper", (dumper,), {"ignore_aliases": lambda self, data: True})
    return yaml.dump(dict(config), Dumper=plain, sort_keys=False, allow_unicode=True, width=120)


def difference(current: Mapping[str, Any], planned: Mapping[str, Any], current_name: str) -> str:
    """Unified diff of two configs; empty when they say the same."""
    lines = difflib.unified_diff(
        as_yaml(current).splitlines(), as_yaml(planned).splitlines(), current_name, "planned", lineterm="", n=4
    )
    return "\n".join(lines)


def summary(plan: DeploymentPlan) -> list[str]:
    """One line a pool, and the sum."""
    lines = []
    for name, rows in plan.by_pool().items():
        parts = [
            f"{row.replicas} x {row.gpu} {row.purchase} at {row.usd_per_hour:g} USD/h, {row.capacity_per_s:.1f} sentences/s "
            f"each{' (estimated, not measured)' if row.estimated else ''}, set by {row.why}"
            for row in rows
        ]
        lines.append(f"{name}: {'; '.join(parts)}")
    total = sum(row.replicas * row.usd_per_hour for row in plan.lines)
    return [*lines, f"total: {sum(row.replicas for row in plan.lines)} replicas, {total:.2f} USD/h"]
