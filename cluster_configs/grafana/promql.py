"""PromQL expressions that know their unit. An unknown metric, the wrong kind or an absent label is an error here.

`rate` of a counter is its unit per second; quantile and mean of a histogram keep its unit; a ratio of equal units has none;
`per` divides different ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster_configs.grafana.catalogue import CATALOGUE, Metric

_WINDOW = "[$__rate_interval]"


class PanelError(ValueError):
    """A panel that Grafana would show empty, or with the wrong unit."""


@dataclass(frozen=True, slots=True)
class Expr:
    """PromQL and the unit of its value; `ratio` is a fraction of 1."""

    text: str
    unit: str


def rate(name: str, *, by: Sequence[str] = (), where: Mapping[str, str] | None = None) -> Expr:
    """Increase of a counter per second, summed over all labels but `by`."""
    metric = _metric(name, "counter", by, where)
    return Expr(f"sum{_by(by)} (rate({metric.name}{_selector(where)}{_WINDOW}))", f"{metric.unit}/s")


def quantile(q: float, name: str, *, by: Sequence[str] = (), where: Mapping[str, str] | None = None) -> Expr:
    """The q-quantile of a histogram's observations in the window; 0 < q < 1."""
    metric = _metric(name, "histogram", by, where)
    buckets = f"sum by ({', '.join((*by, 'le'))}) (rate({metric.name}_bucket{_selector(where)}{_WINDOW}))"
    return Expr(f"histogram_quantile({q:g}, {buckets})", metric.unit)


def mean(name: str, *, by: Sequence[str] = (), where: Mapping[str, str] | None = None) -> Expr:
    """Mean of a histogram's observations in the window."""
    metric = _metric(name, "histogram", by, where)
    total, count = (f"sum{_by(by)} (rate({metric.name}_{part}{_selector(where)}{_WINDOW}))" for part in ("sum", "count"))
    return Expr(f"{total} / {count}", metric.unit)


def level(name: str, *, by: Sequence[str] = (), aggregate: str = "sum", where: Mapping[str, str] | None = None) -> Expr:
    """A gauge now, aggregated over all labels but `by`."""
    metric = _metric(name, "gauge", by, where)
    return Expr(f"{aggregate}{_by(by)} ({metric.name}{_selector(where)})", metric.unit)


def ratio(part: Expr, whole: Expr) -> Expr:
    """part / whole. Raises PanelError unless both have one unit."""
    if part.unit != whole.unit:
        raise PanelError(f"a ratio of {part.unit} and {whole.unit} is not a fraction: {part.text} / {whole.text}")
    return Expr(f"({part.text}) / ({whole.text})", "ratio")


def per(part: Expr, whole: Expr, *, million: bool = False) -> Expr:
    """part for each one of whole, or for each million: rows/s over steps/s is `rows/steps`.

    Raises PanelError for one and the same unit, and for a rate over what is none.
    """
    if part.unit == whole.unit:
        raise PanelError(f"{part.text} and {whole.text} are both in {part.unit}: that is a ratio")
    thing, _, rest = part.unit.partition("/")
    each, _, whole_rest = whole.unit.partition("/")
    if rest != whole_rest:
        raise PanelError(f"{part.unit} over {whole.unit} is not one for each")
    factor, many = ("1e6 * ", "million ") if million else ("", "")
    return Expr(f"{factor}({part.text}) / ({whole.text})", f"{thing}/{many}{each}")


def _metric(name: str, kind: str, by: Sequence[str], where: Mapping[str, str] | None) -> Metric:
    metric = CATALOGUE.get(name)
    if metric is None:
        raise PanelError(f"no metric is called {name}; app/metrics.py and catalogue.py name those that exist")
    if metric.kind != kind:
        raise PanelError(f"{name} is a {metric.kind}, not a {kind}")
    if unknown := {*by, *(where or {})} - metric.labels:
        raise PanelError(f"{name} has no label {', '.join(sorted(unknown))}; it has {', '.join(sorted(metric.labels))}")
    return metric


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _selector(where: Mapping[str, str] | None) -> str:
    """`where` maps a label to a regular expression."""
    return "{" + ", ".join(f'{label}=~"{pattern}"' for label, pattern in where.items()) + "}" if where else ""
