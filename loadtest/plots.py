"""Line and bar charts as SVG text for the report: no files, no scripts, colours from the page (classes s0 to s3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 62
Scale = Literal["linear", "log"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line; a None breaks it. dashed: for limits."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Range, ticks and the way from a value to pixels."""

    low: float
    high: float
    scale: Scale = "linear"

    def fraction(self, value: float) -> float:
        """0 at low, 1 at high, clipped."""
        if self.scale == "log":
            share = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values within the range: 1, 2 or 5 times powers of ten."""
        if self.scale == "log":
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1.0, 2.0, 5.0) if len(decades) < 4 else (1.0,)
            candidates = [step * 10.0**decade for decade in decades for step in steps]
            return [value for value in candidates if self.low * 0.999 <= value <= self.high * 1.001]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_for(values: Sequence[float], scale: Scale = "linear") -> Axis:
    """An axis that shows all values: from 0 when linear, over round decades' parts when logarithmic."""
    finite = [value for value in values if math.isfinite(value) and (scale == "linear" or value > 0)]
    if not finite:
        return Axis(0.1, 1.0, scale)
    if scale == "log":
        low, high = min(finite) / 1.3, max(finite) * 1.3
        return Axis(low, high if high > low * 2 else low * 2, "log")
    high = max(*finite, 0.0)
    return Axis(min(0.0, *finite), high * 1.06 if high > 0 else 1.0)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_scale: Scale = "linear",
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """SVG of the lines. x_ticks: positions and labels to use instead of round numbers."""
    x_axis = _x_axis([x for line in series for x, _ in line.points])
    y_axis = axis_for([y for line in series for _, y in line.points if y is not None], y_scale)
    shapes = [_grid(x_axis, y_axis, x_ticks)]
    for number, line in enumerate(series):
        shapes.extend(_line(line, number, x_axis, y_axis))
    return _frame(title, shapes, x_label, y_label, [line.name for line in series])


def bar_chart(
    title: str, bars: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, x_label: str, y_label: str
) -> str:
    """SVG of stacked bars: (label, one height per name) from left to right."""
    y_axis = axis_for([sum(heights) for _, heights in bars])
    slot = (_WIDTH - _LEFT - _RIGHT) / max(len(bars), 1)
    every = math.ceil(len(bars) / 10)
    ticks = [(_LEFT + (i + 0.5) * slot, label) for i, (label, _) in enumerate(bars) if i % every == 0]
    shapes = [_grid_lines(y_axis), *(_x_tick(x, label) for x, label in ticks)]
    for i, (_, heights) in enumerate(bars):
        base = 0.0
        for number, height in enumerate(heights):
            top, bottom = _y(y_axis, base + height), _y(y_axis, base)
            shapes.append(
                f'<rect class="s{number}" x="{_LEFT + (i + 0.08) * slot:.1f}" y="{top:.1f}" width="{slot * 0.84:.1f}" '
                f'height="{max(bottom - top, 0):.1f}"/>'
            )
            base += height
    return _frame(title, shapes, x_label, y_label, names)


def _x_axis(values: Sequence[float]) -> Axis:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return Axis(low, high if high > low else low + 1.0)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.fraction(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.fraction(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(x_axis: Axis, y_axis: Axis, x_ticks: Sequence[tuple[float, str]] | None) -> str:
    ticks = x_ticks if x_ticks is not None else [(value, _number(value)) for value in x_axis.ticks()]
    return _grid_lines(y_axis) + "".join(_x_tick(_x(x_axis, value), label) for value, label in ticks)


def _grid_lines(y_axis: Axis) -> str:
    lines = []
    for value in y_axis.ticks():
        y = _y(y_axis, value)
        lines.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    return "".join(lines)


def _x_tick(x: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'


def _line(line: Series, number: int, x_axis: Axis, y_axis: Axis) -> list[str]:
    """The unbroken stretches of a line, and its markers."""
    stretches: list[list[str]] = [[]]
    dots = []
    for x, y in line.points:
        if y is None:
            stretches.append([])
            continue
        place = f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}"
        stretches[-1].append(place)
        if line.markers:
            left, top = place.split(",")
            dots.append(f'<circle class="s{number}" cx="{left}" cy="{top}" r="3.5"/>')
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    paths = [" ".join(places) for places in stretches if len(places) > 1]
    return [f'<polyline class="s{number}"{dash} points="{path}"/>' for path in paths] + dots


def _frame(title: str, shapes: Sequence[str], x_label: str, y_label: str, names: Sequence[str]) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    legend, x = [], float(_LEFT)
    for number, name in enumerate(names):
        legend.append(f'<rect class="s{number}" x="{x:.0f}" y="{_HEIGHT - 16}" width="12" height="8"/>')
        legend.append(f'<text class="tick" x="{x + 16:.0f}" y="{_HEIGHT - 8}">{escape(name)}</text>')
        x += 30 + 6.6 * len(name)
    center = (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}'
        f'<text class="label" x="{center}" y="{_HEIGHT - 28}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        f"{''.join(legend)}</svg></figure>"
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"
