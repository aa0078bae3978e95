"""Dashboards: metrics exist with the panel's unit, the committed JSON is what panels.py says, Prometheus can parse it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml

from app.metrics import AUTOSCALING_METRICS, INGRESS_METRICS, POOL_METRICS
from cluster_configs.grafana.catalogue import CATALOGUE, unit_of
from cluster_configs.grafana.generate import FOLDER, GRAFANA_UNITS, dashboard_json, grafana_unit
from cluster_configs.grafana.panels import DASHBOARDS, Dashboard, Panel
from cluster_configs.grafana.promql import Expr, PanelError, level, mean, per, quantile, rate, ratio
from tests.cluster_configs.folder import tool

each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
_RAY = Path(ray.__file__).parent
_OUR_SPECS = (*INGRESS_METRICS.values(), *POOL_METRICS.values(), *AUTOSCALING_METRICS.values())
_RAY_SOURCES = (_RAY / "serve/_private", _RAY / "dashboard/modules/reporter")


@each_dashboard
def test_committed_files_are_up_to_date(dashboard: Dashboard) -> None:
    committed = (FOLDER / f"{dashboard.uid}.json").read_text(encoding="utf-8")
    assert committed == dashboard_json(dashboard), "run: python -m cluster_configs.grafana.generate"


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {dashboard.uid for dashboard in DASHBOARDS}


def test_every_panel_expression_names_an_exported_metric() -> None:
    for dashboard in DASHBOARDS:
        for panel in json.loads(dashboard_json(dashboard))["panels"]:
            for target in panel["targets"]:
                names = re.findall(r"\bray_[a-z0-9_]+", target["expr"])
                assert names
                for name in names:
                    assert name in CATALOGUE or re.sub(r"_(bucket|sum|count)$", "", name) in CATALOGUE, name


@each_dashboard
def test_legends_use_labels_that_survive_the_aggregation(dashboard: Dashboard) -> None:
    for panel in dashboard.panels:
        for legend, expr in panel.series.items():
            kept = {label for clause in re.findall(r"by \(([^)]*)\)", expr.text) for label in clause.split(", ")}
            assert set(re.findall(r"{{(\w+)}}", legend)) == kept - {"le"}, (panel.title, legend)


def test_rays_metrics_are_in_the_installed_ray() -> None:
    sources = "".join(path.read_text() for folder in _RAY_SOURCES for path in folder.rglob("*.py"))
    ours = {f"ray_{spec.name}" for spec in _OUR_SPECS}
    rays = [name.removeprefix("ray_") for name in CATALOGUE if name not in ours]
    assert len(rays) >= 10
    for name in rays:  # Ray's exporter appends `_total` to a counter whose name lacks it
        assert f'"{name}"' in sources or f'"{name.removesuffix("_total")}"' in sources, name


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("ray_babelephant_queue_seconds", "s"),
        ("ray_babelephant_http_requests_total", "requests"),
        ("ray_babelephant_source_characters_total", "characters"),
        ("ray_babelephant_waiting_sentences", "sentences"),
    ],
)
def test_units_come_from_names(name: str, unit: str) -> None:
    assert CATALOGUE[name].unit == unit


def test_durations_and_bytes_of_ours_get_grafanas_units() -> None:
    for spec in (*INGRESS_METRICS.values(), *POOL_METRICS.values()):
        if spec.name.endswith(("_seconds", "_bytes")):
            assert unit_of(spec) in GRAFANA_UNITS
    assert (grafana_unit("tokens/s"), grafana_unit("rows"), grafana_unit("ratio")) == ("cps", "short", "percentunit")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rate("ray_babelephant_http_request_total"), "no metric is called"),
        (lambda: rate("babelephant_http_requests_total"), "no metric is called"),
        (lambda: rate("ray_babelephant_live_rows"), "is a gauge, not a counter"),
        (lambda: quantile(0.5, "ray_babelephant_sentences_total"), "is a counter, not a histogram"),
        (lambda: level("ray_babelephant_live_rows", by=("pol",)), "has no label pol"),
        (lambda: mean("ray_babelephant_queue_seconds", where={"route": "x"}), "has no label route"),
        (
            lambda: ratio(level("ray_babelephant_live_rows"), level("ray_babelephant_waiting_sentences")),
            "not a fraction",
        ),
        (
            lambda: per(rate("ray_babelephant_decoded_rows_total"), level("ray_babelephant_waiting_sentences")),
            "rows/s over sentences is not one for each",
        ),
        (
            lambda: per(level("ray_babelephant_live_rows"), level("ray_babelephant_max_rows")),
            "that is a ratio",
        ),
        (
            lambda: Panel("Wait", "ms", {"p50": quantile(0.5, "ray_babelephant_queue_seconds")}, ""),
            "shows ms, but 'p50' is in s",
        ),
    ],
)
def test_mistakes_cannot_become_a_panel(build: Callable[[], Expr | Panel], message: str) -> None:
    with pytest.raises(PanelError, match=re.escape(message)):
        build()


def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    recorded = [
        {"record": f"r{number}", "expr": expr.text.replace("$__rate_interval", "1m")}
        for number, expr in enumerate(e for d in DASHBOARDS for p in d.panels for e in p.series.values())
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    checked = subprocess.run(
        [tool("promtool"), "check", "rules", str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert checked.returncode == 0, checked.stderr
