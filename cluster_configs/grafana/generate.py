"""Writes dashboards/*.json from panels.py: `python -m cluster_configs.grafana.generate`, from the repository's root.

The files are for Grafana 10 or newer: import them by hand, or let its provisioning read the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster_configs.grafana.panels import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).resolve().parent / "dashboards"
_WIDTH, _HEIGHT, _PER_ROW = 12, 8, 2
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GRAFANA_UNITS = {
    "s": "s",
    "ms": "ms",
    "ratio": "percentunit",
    "percent": "percent",
    "bytes": "bytes",
    "MiB": "mbytes",
    "requests/s": "reqps",
}


def grafana_unit(unit: str) -> str:
    """Grafana's id for a unit of ours; things counted are plain numbers, per second `cps`."""
    return GRAFANA_UNITS.get(unit) or ("cps" if unit.endswith("/s") else "short")


def dashboard_json(dashboard: Dashboard) -> str:
    """The file's text."""
    return json.dumps(_dashboard(dashboard), indent=1, ensure_ascii=False) + "\n"


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    variables: list[dict[str, Any]] = [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
    if dashboard.pool_variable:
        query = "label_values(ray_babelephant_max_rows, pool)"
        variables.append(
            {
                "name": "pool",
                "type": "query",
                "datasource": _DATASOURCE,
                "definition": query,
                "query": {"query": query, "refId": "pools"},
                "includeAll": True,
                "multi": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
                "refresh": 2,
            }
        )
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["babelephant"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": variables},
        "panels": [_panel(panel, index) for index, panel in enumerate(dashboard.panels)],
    }


def _panel(panel: Panel, index: int) -> dict[str, Any]:
    row, column = divmod(index, _PER_ROW)
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATASOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": grafana_unit(panel.unit), "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _DATASOURCE, "expr": expr.text, "legendFormat": legend}
            for number, (legend, expr) in enumerate(panel.series.items())
        ],
    }


def main() -> None:
    """Write every dashboard."""
    FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        path = FOLDER / f"{dashboard.uid}.json"
        path.write_text(dashboard_json(dashboard), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
