"""Roofline of a benchmark report (the JSON that `kernels.bench --out` writes): needs matplotlib, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels.bench_rows import Machine, Row

_COLUMNS = {"machine", "rows"}


def read_report(report: dict[str, Any]) -> tuple[Machine, list[Row]]:
    """Machine and rows of a report; ValueError names what is missing."""
    if missing := _COLUMNS - report.keys():
        raise ValueError(f"not a benchmark report, {sorted(missing)} missing: write one with kernels.bench --out")
    rows = [Row(**{name: value for name, value in row.items() if name != "floor_us"}) for row in report["rows"]]
    return Machine(**report["machine"]), rows


def roof_flops_per_s(machine: Machine, flops_per_byte: float) -> float:
    """The roofline: what bandwidth or the matmul rate allows at this arithmetic intensity, in FLOP/s."""
    return min(machine.bytes_per_s * flops_per_byte, machine.flops_per_s)


def plot_roofline(machine: Machine, rows: list[Row], path: Path) -> None:
    """Two log-log panels into `path`: FLOP/s over FLOPs per byte (rows that count FLOPs) under the roofline, and GB/s over
    bytes touched (all rows) under the bandwidth with its launch time. Rows whose check failed are left out; ValueError when
    none is left.
    """
    good = [row for row in rows if row.ok and row.us > 0]
    if not good:
        raise ValueError("no row passed its check: nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    compute, memory = figure.subplots(1, 2)
    _draw_compute(compute, machine, [row for row in good if row.flops])
    _draw_memory(memory, machine, good)
    figure.suptitle(f"kernels on {machine.name}")
    figure.savefig(path, dpi=130)


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by op and the part of the case that names no size: one colour each."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        words = [word for word in row.case.split() if not word.startswith(("T=", "R=", "active="))]
        found.setdefault(" ".join(dict.fromkeys((row.op, *words))), []).append(row)
    return found


def _style(index: int) -> str:
    """Line with a marker that changes when the ten colours start again."""
    return "os^v"[index // 10 % 4] + "-"


def _draw_compute(axes: Any, machine: Machine, rows: list[Row]) -> None:
    for index, (name, points) in enumerate(_series(rows).items()):
        x = [row.flops / row.bytes_touched for row in points]
        axes.plot(x, [row.flops / row.us * 1e6 for row in points], _style(index), label=name, markersize=4, linewidth=0.8)
    intensity = np.geomspace(1, 1e4, 200)
    axes.plot(intensity, [roof_flops_per_s(machine, x) for x in intensity], "k--", label="measured ceilings")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte touched", ylabel="FLOP/s")
    axes.legend(fontsize=7)


def _draw_memory(axes: Any, machine: Machine, rows: list[Row]) -> None:
    for index, (name, points) in enumerate(_series(rows).items()):
        x = [row.bytes_touched for row in points]
        y = [row.bytes_touched / row.us * 1e6 for row in points]
        axes.plot(x, y, _style(index), label=name, markersize=4, linewidth=0.8)
    size = np.geomspace(min(row.bytes_touched for row in rows), max(row.bytes_touched for row in rows) * 1.01, 200)
    for launches, style in ((1, "k--"), (2, "k:")):
        floor_us = [Row("", "", 0, 0, 0, int(s), launches=launches).floor_us(machine) for s in size]
        axes.plot(size, size / floor_us * 1e6, style, label=f"read bandwidth after {launches} launch{'es' * (launches - 1)}")
    axes.set(xscale="log", yscale="log", xlabel="bytes touched", ylabel="bytes per second")
    axes.legend(fontsize=7)
