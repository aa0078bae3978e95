"""A result as one HTML page: style and plots inside, nothing fetched, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from loadtest.latency import CURVE_PERCENTILES, LatencySummary
from loadtest.outcomes import Outcome
from loadtest.plots import Series, bar_chart, line_chart
from loadtest.results import KneeResult, RunResult, Trial

_STYLE = Path(__file__).with_name("report.css")
_VERDICTS = {"met": "shown", "missed": "missed", "undecided": "not shown (too few requests to decide)"}


def render_report(result: RunResult | KneeResult) -> str:
    """The whole page."""
    body = _run_page(result) if isinstance(result, RunResult) else _knee_page(result)
    title = escape(f"Load test {result.label}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )


def _run_page(run: RunResult) -> str:
    schedule = run.schedule
    about = (
        f"{run.created_at} · {run.url} · workload {run.workload} · {schedule.arrivals} arrivals, "
        f"{schedule.num_scheduled} requests in {schedule.duration_s:g} s "
        f"(warm-up {schedule.warmup_s:g} s), seed {schedule.seed}"
    )
    return _about(about) + _run_sections(run)


def _run_sections(run: RunResult) -> str:
    return "".join(
        [
            _banners(run),
            _run_cards(run),
            "<h2>Plots</h2><div class='plots'>",
            *_run_plots(run),
            "</div>",
            _outcome_table(run),
            _latency_table(run),
            _pair_table(run),
        ]
    )


def _banners(run: RunResult) -> str:
    share = f"{run.rates.good_fraction:.3%} good, confidence {run.confidence:g}"
    parts = [_banner(run.slo_verdict, f"SLO {run.slo}: {_VERDICTS[run.slo_verdict]} ({share})")]
    parts += [_banner("missed", f"Not a valid measurement: {reason}") for reason in run.invalid_because]
    parts += [_banner("undecided", f"Note: {warning}") for warning in run.warnings]
    return "".join(parts)


def _run_cards(run: RunResult) -> str:
    rates, lag = run.rates, run.client.send_lag
    cards = [
        ("offered", f"{rates.offered_per_s:.4g}/s"),
        ("completed", f"{rates.completed_per_s:.4g}/s"),
        ("goodput", f"{rates.goodput_per_s:.4g}/s"),
        ("p50", _ms(run.latency.p50_s if run.latency else None)),
        ("p99", _ms(run.latency.p99_s if run.latency else None)),
        ("source characters", f"{rates.source_chars_per_s:.4g}/s"),
        ("target characters", f"{rates.target_chars_per_s:.4g}/s"),
        ("lost", str(run.counts.lost)),
        ("send lag p99", _ms(lag.p99_s if lag else None)),
        ("client CPU", f"{run.client.cpu_fraction:.0%} of a core"),
        ("sender processes", str(run.client.num_processes)),
    ]
    if run.cost:
        cards.append(("USD per 1 M characters in the SLO", _usd(run.cost.usd_per_million_good_chars)))
        cards.append(("USD per 1 M characters", _usd(run.cost.usd_per_million_chars)))
    return (
        "<div class='cards'>"
        + "".join(f"<div class='card'>{escape(n)}<b>{escape(v)}</b></div>" for n, v in cards)
        + "</div>"
    )


def _run_plots(run: RunResult) -> list[str]:
    middles = [(window, window.start_s + window.length_s / 2) for window in run.windows]
    over_time = [
        Series("p50", [(t, window.p50_s) for window, t in middles], markers=len(middles) < 30),
        Series("p99", [(t, window.p99_s) for window, t in middles], markers=len(middles) < 30),
        Series(f"SLO {run.slo.latency_s:g} s", [(t, run.slo.latency_s) for _, t in middles], dashed=True),
    ]
    kinds = ["good", "answered too late", "failed", "refused"]
    bars = [
        (f"{w.start_s:.0f}", [count / w.length_s for count in (w.good, w.slow, w.failed, w.refused)]) for w in run.windows
    ]
    charts = [
        line_chart("Latency over time", over_time, x_label="intended send, s", y_label="latency, s", y_scale="log"),
        bar_chart("Requests over time, by how they ended", bars, kinds, x_label="intended send, s", y_label="requests/s"),
        _percentile_chart("Latency by percentile", [("latency", run.latency)]),
        _percentile_chart("Send lag: actual minus intended send", [("lag", run.client.send_lag)]),
    ]
    if run.server_timing:
        charts.append(_percentile_chart("Service's own times (Server-Timing)", list(run.server_timing.items())[:4]))
    lengths = [(str(bin_.low), [float(bin_.count)]) for bin_ in run.source_lengths]
    charts.append(
        bar_chart("Source characters per request", lengths, ["requests"], x_label="from characters", y_label="requests")
    )
    return charts


def _percentile_chart(title: str, named: Sequence[tuple[str, LatencySummary | None]]) -> str:
    positions = range(len(CURVE_PERCENTILES))
    lines = [
        Series(name, list(zip(positions, summary.curve_s, strict=True))) for name, summary in named if summary is not None
    ]
    ticks = [
        (float(i), f"{p:g}") for i, p in enumerate(CURVE_PERCENTILES) if p in (0, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100)
    ]
    return line_chart(title, lines, x_label="percentile", y_label="s", y_scale="log", x_ticks=ticks)


def _outcome_table(run: RunResult) -> str:
    counts = run.counts.model_dump()
    rows = [[o.name.lower(), str(counts[o.name.lower()]), o.meaning + (" (lost)" if o.lost else "")] for o in Outcome]
    rows.append(["sent", str(run.counts.sent), "all of the above; the warm-up is not counted"])
    statuses = ", ".join(f"{status}: {count}" for status, count in run.statuses.items())
    table = _table(["outcome", "requests", "meaning"], rows)
    return f"<h2>How requests ended</h2>{table}<p>HTTP statuses: {escape(statuses)}</p>"


def _latency_table(run: RunResult) -> str:
    named = [("latency from the intended send", run.latency), ("send lag", run.client.send_lag)]
    named += [(f"service: {name}", summary) for name, summary in run.server_timing.items()]
    named.append(("outside the service's total", run.overhead))
    rows = [[name, *_latency_cells(summary)] for name, summary in named if summary is not None]
    return f"<h2>Times</h2>{_table(['', 'count', 'mean', 'p50', 'p90', 'p95', 'p99', 'p99.9', 'max'], rows)}"


def _pair_table(run: RunResult) -> str:
    rows = [
        [pair.pair, str(pair.sent), str(pair.ok), str(pair.good), str(pair.source_chars), *_latency_cells(pair.latency)[2:]]
        for pair in run.by_pair
    ]
    header = ["pair", "sent", "answered", "good", "characters", "p50", "p90", "p95", "p99", "p99.9", "max"]
    return f"<h2>Language pairs</h2>{_table(header, rows)}"


def _knee_page(knee: KneeResult) -> str:
    trials = sorted(knee.trials, key=lambda trial: trial.rate_per_s)
    state = "met" if knee.knee_per_s is not None else "missed"
    found = f"{knee.knee_per_s:.4g} requests/s" if knee.knee_per_s is not None else "no rate showed the SLO"
    beyond = f", not at {knee.fails_at_per_s:.4g}" if knee.fails_at_per_s is not None else ""
    rates = [(trial.rate_per_s, trial.run) for trial in trials]
    limits = [(rate, knee.slo.latency_s) for rate, _ in rates]
    latencies = [
        Series("p50", [(rate, run.latency.p50_s if run.latency else None) for rate, run in rates], markers=True),
        Series("p99", [(rate, run.latency.p99_s if run.latency else None) for rate, run in rates], markers=True),
        Series(f"SLO {knee.slo.latency_s:g} s", limits, dashed=True),
    ]
    throughput = [
        Series("goodput", [(rate, run.rates.goodput_per_s) for rate, run in rates], markers=True),
        Series("completed", [(rate, run.rates.completed_per_s) for rate, run in rates], markers=True),
        Series("offered", [(rate, rate) for rate, _ in rates], dashed=True),
    ]
    parts = [
        _about(f"{knee.created_at} · SLO {knee.slo}, confidence {knee.confidence:g} · {knee.finished}"),
        _banner(state, f"Knee: {found}{beyond}"),
        "<div class='plots'>",
        line_chart("Latency by offered rate", latencies, x_label="offered, requests/s", y_label="s", y_scale="log"),
        line_chart("Throughput by offered rate", throughput, x_label="offered, requests/s", y_label="requests/s"),
        "</div>",
        _trial_table(trials),
    ]
    if knee.best is not None:
        parts.append(f"<h2>The run at the knee ({knee.best.url}, workload {escape(knee.best.workload)})</h2>")
        parts.append(_run_sections(knee.best))
    return "".join(parts)


def _trial_table(trials: Sequence[Trial]) -> str:
    rows = [
        [
            f"{trial.rate_per_s:.4g}",
            trial.purpose,
            trial.verdict + (" (early)" if trial.stopped_early else ""),
            "yes" if trial.run.valid else "no",
            str(trial.run.counts.sent),
            f"{trial.run.rates.good_fraction:.3%}",
            *_latency_cells(trial.run.latency)[2:],
        ]
        for trial in trials
    ]
    header = ["rate/s", "purpose", "SLO", "valid", "requests", "good", "p50", "p90", "p95", "p99", "p99.9", "max"]
    return f"<h2>Trials</h2>{_table(header, rows)}"


def _about(text: str) -> str:
    return f"<p class='about'>{escape(text)}</p>"


def _banner(kind: str, text: str) -> str:
    return f"<div class='banner {kind}'>{escape(text)}</div>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def _latency_cells(summary: LatencySummary | None) -> list[str]:
    if summary is None:
        return ["0", *["–"] * 7]
    values = (summary.mean_s, summary.p50_s, summary.p90_s, summary.p95_s, summary.p99_s, summary.p99_9_s, summary.max_s)
    return [str(summary.count), *map(_ms, values)]


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.4g} s" if seconds >= 10 else f"{seconds * 1000:.4g} ms"


def _usd(amount: float | None) -> str:
    return "–" if amount is None else f"{amount:.4g}"
