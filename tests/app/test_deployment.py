"""A plan becomes a Serve config: counts, prices, refusals, and a diff that patch can apply."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import main
from app.cost.hardware import price_catalogue
from app.cost.plan import PlanRules, PoolDemand, make_plan
from app.cost.profile import Birth, Profile
from app.deployment import DeploymentError, DeploymentPlan, as_yaml, difference, planned_config
from app.serve_config import ServeConfigError, load_serve_config, read_yaml

PRODUCTION = Path(__file__).resolve().parents[2] / "cluster_configs/serve/production.yaml"


def line(pool: str, replicas: int, **changes: Any) -> dict[str, Any]:
    base = {"pool": pool, "gpu": "H100", "purchase": "on_demand", "replicas": replicas, "usd_per_hour": 3.0}
    return base | {"capacity_per_s": 40.0, "estimated": False, "why": "peak"} | changes


def plan_of(*lines: dict[str, Any]) -> DeploymentPlan:
    return DeploymentPlan.model_validate({"format": "babelephant-plan-1", "lines": list(lines)})


WHOLE = plan_of(line("world", 3), line("asia", 2), line("europe", 2, gpu="L4", usd_per_hour=0.7))


def deployments(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in config["applications"][0]["deployments"]}


def test_counts_and_prices_arrive_and_nothing_else_moves() -> None:
    raw = read_yaml(PRODUCTION)
    planned = planned_config(raw, WHOLE)
    before, after = deployments(read_yaml(PRODUCTION)), deployments(planned)
    assert deployments(raw) == before  # the input is untouched, although its YAML anchors share objects
    for name, replicas, price in (("world", 3, 3.0), ("asia", 2, 3.0), ("europe", 2, 0.7)):
        scaling = {**before[name]["autoscaling_config"], "min_replicas": replicas, "max_replicas": replicas}
        assert after[name] == {**before[name], "autoscaling_config": scaling, "user_config": {"usd_per_hour": price}}
    assert after["ingress"] == before["ingress"]
    assert planned["applications"][0]["args"] == raw["applications"][0]["args"]


def test_keep_minimum_leaves_room_for_a_policy() -> None:
    after = deployments(planned_config(read_yaml(PRODUCTION), WHOLE, keep_minimum=True))
    assert [after["world"]["autoscaling_config"][key] for key in ("min_replicas", "max_replicas")] == [1, 3]


def test_a_pool_bought_in_two_ways_has_their_mean_price() -> None:
    mixed = plan_of(line("world", 3), line("world", 1, purchase="spot", usd_per_hour=1.0), *WHOLE.model_dump()["lines"][1:])
    world = deployments(planned_config(read_yaml(PRODUCTION), mixed))["world"]
    assert world["autoscaling_config"]["max_replicas"] == 4
    assert world["user_config"] == {"usd_per_hour": 2.5}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("word", 1)], "the plan has pools word, the config has asia, europe, world"),
        ([line("world", 1), line("asia", 1)], "says nothing about pools europe"),
        (
            [line("world", 1), line("asia", 1), line("europe", 1), line("europe", 1, gpu="L4")],
            "europe is planned on H100, L4",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        planned_config(read_yaml(PRODUCTION), plan_of(*lines))


def test_a_fixed_count_is_refused_and_unknown_keys_are() -> None:
    raw = json.loads(json.dumps(read_yaml(PRODUCTION)))
    world = deployments(raw)["world"]
    del world["autoscaling_config"]
    world["num_replicas"] = 2
    with pytest.raises(DeploymentError, match="would restart every replica"):
        planned_config(raw, WHOLE)
    raw = json.loads(json.dumps(read_yaml(PRODUCTION)))
    deployments(raw)["asia"]["max_replica"] = 3
    with pytest.raises(ServeConfigError, match="max_replica is not a Serve setting"):
        planned_config(raw, WHOLE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan file"),
        ('{"format": "babelephant-plan-2", "lines": []}', "babelephant-plan-1"),
        (json.dumps({"format": "babelephant-plan-1", "lines": [line("a", 0)]}), "replicas"),
        (json.dumps({"format": "babelephant-plan-1", "lines": [line("a", 1, gpus=2)]}), "gpus"),
        (json.dumps({"format": "babelephant-plan-1", "lines": []}), "lines"),
    ],
)
def test_strange_plan_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(DeploymentError, match=message):
        DeploymentPlan.read(path)
    with pytest.raises(DeploymentError, match="write one with"):
        DeploymentPlan.read(tmp_path / "absent.json")


def test_a_real_plan_goes_through(tmp_path: Path) -> None:
    """The planner's own answer for the three pools, written and read again."""
    catalogue = price_catalogue()
    born = Birth("2026-11-24", "abc", "H100", "measured")
    profile = Profile("H100", "m", "w4a16", 4, False, 0.001, 1e-5, 0.0, 0.005, 1e-4, 60.0, 1e9, 32, born, {})
    pools = [PoolDemand(name, peak, peak / 2, 100, 25, 28) for name, peak in (("world", 150), ("asia", 20), ("europe", 60))]
    offers = [offer for offer in catalogue.offers if offer.gpu == "H100" and offer.purchase == "on_demand"][:1]
    plan = make_plan(pools, offers, {"H100": profile}, PlanRules(), catalogue)
    path = tmp_path / "plan.json"
    path.write_text(DeploymentPlan.from_plan(plan).model_dump_json())
    after = deployments(planned_config(read_yaml(PRODUCTION), DeploymentPlan.read(path)))
    for planned in plan.lines:
        assert after[planned.pool.name]["autoscaling_config"]["max_replicas"] == planned.replicas
        assert after[planned.pool.name]["user_config"]["usd_per_hour"] == pytest.approx(planned.offer.usd_per_hour, abs=1e-4)


def test_the_diff_turns_the_current_file_into_the_planned_one(tmp_path: Path) -> None:
    """patch(1) is the judge."""
    if shutil.which("patch") is None:
        pytest.skip("patch is not installed")
    raw = read_yaml(PRODUCTION)
    planned = planned_config(raw, WHOLE)
    current = tmp_path / "current.yaml"
    current.write_text(as_yaml(raw))
    (tmp_path / "diff").write_text(difference(raw, planned, "current.yaml") + "\n")
    subprocess.run(["patch", str(current), str(tmp_path / "diff")], check=True, capture_output=True)
    assert read_yaml(current) == planned
    assert difference(planned, planned, "x") == ""


def test_the_command_prints_and_writes_what_serve_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "plan.json", tmp_path / "planned.yaml"
    path.write_text(WHOLE.model_dump_json())
    assert main(["deploy", str(path)]) == 2
    assert "add --dry-run" in capsys.readouterr().err
    assert main(["deploy", "--dry-run", str(path), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "# total: 7 replicas, 16.40 USD/h" in shown
    text, _, diff = shown.partition("\n--- ")
    assert yaml.safe_load(text) == read_yaml(output)
    changed = {changed.replace(" ", "") for changed in diff.splitlines() if changed.startswith(("+ ", "- "))}
    assert {"-max_replicas:4", "+max_replicas:3", "+usd_per_hour:0.7"} <= changed
    load_serve_config(output)
    assert main(["deploy", "--dry-run", str(path), "--config", str(output)]) == 0
    assert "already says this" in capsys.readouterr().out
