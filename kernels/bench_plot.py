"""Roofline of a benchmark report (the JSON that `kernels.bench --out` writes): needs matplotlib, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels.bench_rows import Machine, Report, Row, floor_us


def roof_flops_per_s(machine: Machine, flops_per_byte: float) -> float:
    """The roofline: what bandwidth or the matmul rate allows at this arithmetic intensity, in FLOP/s."""
    return min(machine.bytes_per_s * flops_per_byte, machine.flops_per_s)


def plot_roofline(report: Report, path: Path) -> None:
    """Two log-log panels into `path`: FLOP/s over FLOPs per byte (rows that count FLOPs) under the roofline, and GB/s over
    bytes touched (all rows) under the bandwidth with its launch time. Rows whose check failed are left out; ValueError when
    none is left.
    """
    machine, born = report.machine, report.certificate
    good = [row for row in report.rows if row.ok and row.us > 0]
    if not good:
        raise ValueError("no row passed its check: nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    compute, memory = figure.subplots(1, 2)
    _draw_compute(compute, machine, [row for row in good if row.flops])
    _draw_memory(memory, machine, good)
    figure.suptitle(f"kernels on {machine.name}, {born['date']}, commit {born['commit']}")
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
        least_us = [floor_us(machine, s, 0.0, launches) for s in size]
        axes.plot(size, size / least_us * 1e6, style, label=f"read bandwidth after {launches} launch{'es' * (launches - 1)}")
    axes.set(xscale="log", yscale="log", xlabel="bytes touched", ylabel="bytes per second")
    axes.legend(fontsize=7)
