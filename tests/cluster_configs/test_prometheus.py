"""Alert rules and scrape configurations: our own strict check always, promtool where it is installed."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_configs.grafana.catalogue import CATALOGUE, Metric
from tests.cluster_configs.folder import CONFIGS, load, tool

FOLDER = CONFIGS / "prometheus"
ALERTS = FOLDER / "alerts.yaml"
SCRAPE_FILES = sorted(path for path in FOLDER.glob("*.yaml") if path != ALERTS)
_KEYS = {"alert", "expr", "for", "labels", "annotations"}
_PARTS = ("_bucket", "_sum", "_count")


def exported(name: str) -> Metric | None:
    """The metric behind an exported name, a histogram's parts included; None where nobody exports it."""
    if (metric := CATALOGUE.get(name)) is not None:
        return None if metric.kind == "histogram" else metric
    base = next((CATALOGUE.get(name.removesuffix(part)) for part in _PARTS if name.endswith(part)), None)
    return base if base is not None and base.kind == "histogram" else None


def problems(rule: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a rule that promtool would accept."""
    if unknown := rule.keys() - _KEYS:
        yield f"unknown keys {sorted(unknown)}"
    expr = rule.get("expr", "")
    metrics = {name: exported(name) for name in re.findall(r"\bray_[a-z0-9_]+", expr)}
    yield from (f"nobody exports {name}" for name, metric in metrics.items() if metric is None)
    if not metrics and not re.search(r"\bup\b", expr):
        yield "no metric"
    for function, name in re.findall(r"\b(rate|increase)\((\w+)", expr):
        if (metric := metrics.get(name)) is not None and metric.kind == "gauge":
            yield f"{function} of the gauge {name}"
    known = {"le", "job"}.union(*(metric.labels for metric in metrics.values() if metric is not None))
    grouping = {label.strip() for clause in re.findall(r"\b(?:by|without) \(([^)]*)\)", expr) for label in clause.split(",")}
    matched = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expr))
    yield from (f"no metric here has the label {label}" for label in sorted((grouping | matched) - known))
    annotations = rule.get("annotations", {})
    if annotations.keys() != {"summary", "runbook"} or rule.get("labels", {}).get("severity") not in ("page", "ticket"):
        yield "needs summary, runbook and a severity of page or ticket"
    if not re.fullmatch(r"[^\n]{40,}\.", annotations.get("runbook", "")):
        yield "the runbook is one line that ends with a full stop"
    yield from (
        f"the summary names {label}, which the result does not have"
        for label in re.findall(r"\$labels\.(\w+)", annotations.get("summary", ""))
        if label not in grouping
    )


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(ALERTS)["groups"] for rule in group["rules"]]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_rules_use_metrics_that_exist(rule: dict[str, Any]) -> None:
    assert list(problems(rule)) == []


def test_names_are_unique() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.update(expr=r["expr"].replace("http_requests", "http_request")), "nobody exports"),
        (lambda r: r.update(expr="ray_babelephant_queue_seconds > 1"), "nobody exports ray_babelephant_queue_seconds"),
        (lambda r: r.update(expr="rate(ray_babelephant_live_rows[5m]) > 1"), "rate of the gauge"),
        (lambda r: r.update(expr=r["expr"].replace("status=", "code=")), "no metric here has the label code"),
        (lambda r: r.update(expr="sum by (pol) (ray_babelephant_live_rows) > 1"), "no metric here has the label pol"),
        (lambda r: r.update(form="5m"), "unknown keys ['form']"),
        (lambda r: r["annotations"].pop("runbook"), "needs summary, runbook"),
        (lambda r: r["annotations"].update(summary="{{ $labels.pool }} is slow"), "names pool"),
    ],
)
def test_mistakes_are_found(change: Callable[[Any], object], problem: str) -> None:
    rule = copy.deepcopy(next(rule for rule in rules() if rule["alert"] == "BabelephantServerErrors"))
    change(rule)
    assert any(problem in found for found in problems(rule))


def test_promtool_accepts_the_rules_and_they_fire_when_they_should() -> None:
    checked = promtool("check", "rules", ALERTS)
    assert checked.returncode == 0, checked.stderr
    tested = promtool("test", "rules", Path(__file__).with_name("alerts.test.yaml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("old", "new"), [("expr:", "exprs:"), ("> 0.01", "> > 0.01"), ("for: 5m", "for: five minutes"), ("sum(", "summ(")]
)
def test_promtool_refuses_mistakes(tmp_path: Path, old: str, new: str) -> None:
    broken = tmp_path / "alerts.yaml"
    broken.write_text(ALERTS.read_text().replace(old, new, 1))
    assert broken.read_text() != ALERTS.read_text()
    assert promtool("check", "rules", broken).returncode != 0


@pytest.mark.parametrize("path", SCRAPE_FILES, ids=lambda path: path.stem)
def test_promtool_accepts_the_scrape_configuration(path: Path, tmp_path: Path) -> None:
    checked = promtool("check", "config", path)
    if "field kubernetes_sd_configs not found" in checked.stderr:  # Debian builds promtool without Kubernetes
        config = load(path)
        for job in config["scrape_configs"]:
            job.pop("kubernetes_sd_configs")
        (tmp_path / "alerts.yaml").write_text(ALERTS.read_text())
        (tmp_path / "rest.yaml").write_text(yaml.safe_dump(config))
        checked = promtool("check", "config", tmp_path / "rest.yaml")
    assert checked.returncode == 0, checked.stderr


def test_kubernetes_discovery_finds_the_pods_that_we_deploy() -> None:
    (job,) = load(FOLDER / "kubernetes.yaml")["scrape_configs"]
    assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"names": ["babelephant"]}}]
    keep = job["relabel_configs"][0]
    assert keep["source_labels"] == [
        "__meta_kubernetes_pod_label_app_kubernetes_io_name",
        "__meta_kubernetes_pod_container_port_name",
    ]
    cluster = load(CONFIGS / "kuberay/base/rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        name = group["template"]["metadata"]["labels"]["app.kubernetes.io/name"]
        (container,) = group["template"]["spec"]["containers"]
        (port,) = [p for p in container["ports"] if re.fullmatch(keep["regex"], f"{name};{p['name']}")]
        assert str(port["containerPort"]) == group["rayStartParams"]["metrics-export-port"]


@pytest.mark.parametrize("path", SCRAPE_FILES, ids=lambda path: path.stem)
def test_scrapes_evaluate_our_rules_under_the_job_that_they_name(path: Path) -> None:
    config = load(path)
    assert config["rule_files"] == ["alerts.yaml"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["babelephant"]
