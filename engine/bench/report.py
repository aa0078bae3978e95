"""The benchmark's report: typed rows, JSON that is rewritten as each cell ends, a table, a plot."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.bench.ablation import StepAblation
from engine.bench.check import CheckResult
from engine.bench.engine_run import EngineRun
from engine.bench.measure import StepProfile
from engine.bench.serving_mix import MixReport, StreamResult
from engine.bench.shapes import PEERS, Cell

MIN_EXPERT_COVERAGE = 0.9
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine in one cell; times are medians of `repeats` runs. None: not measured or without meaning here.

    step_ms: one decode step. floor_share: (bytes_per_step / read bandwidth) / step. token_agreement: with transformers.
    """

    engine: str
    repeats: int
    tokens_per_s: float
    total_ms: float
    encode_ms: float
    step_ms: float
    slowest_over_fastest: float
    token_agreement: float | None = None
    bytes_per_step: int | None = None
    floor_share: float | None = None
    peak_bytes: int | None = None
    profile: StepProfile | None = None

    @classmethod
    def of(cls, engine: str, runs: Sequence[EngineRun]) -> EngineRow:
        """Times of equal runs."""
        totals = [run.total_s for run in runs]
        total_s = statistics.median(totals)
        return cls(
            engine=engine,
            repeats=len(runs),
            tokens_per_s=runs[0].token_ids.size / total_s,
            total_ms=total_s * 1e3,
            encode_ms=statistics.median(run.encode_s for run in runs) * 1e3,
            step_ms=statistics.median(run.step_s for run in runs) * 1e3,
            slowest_over_fastest=max(totals) / min(totals),
        )


@dataclass(slots=True)
class CellReport:
    """All engines in one cell.

    Experts: distinct ones per sparse layer (and step, in the decoder), and how many uniform routing would touch.
    """

    cell: Cell
    decoder_experts: float
    decoder_experts_uniform: float
    encoder_experts: float
    encoder_experts_uniform: float
    paper_ratio: float | None
    refusal: str | None = None
    rows: dict[str, EngineRow] = field(default_factory=dict)

    @property
    def has_collapsed(self) -> bool:
        """A decoder step reaches too few experts."""
        return self.decoder_experts < MIN_EXPERT_COVERAGE * self.decoder_experts_uniform

    def ratio(self, engine: str, peer: str) -> float | None:
        """tokens/s of `engine` over that of `peer`."""
        if engine not in self.rows or peer not in self.rows:
            return None
        return self.rows[engine].tokens_per_s / self.rows[peer].tokens_per_s


@dataclass(slots=True)
class Report:
    """Everything a run found out. `refusals`: what was not reported because a check failed; `notes`: what was left out."""

    certificate: dict[str, str]
    model: dict[str, Any]
    bytes_per_s: float
    planned_bytes: dict[str, int] = field(default_factory=dict)
    build_s: dict[str, float] = field(default_factory=dict)
    checks: dict[str, list[CheckResult]] = field(default_factory=dict)
    cells: dict[str, CellReport] = field(default_factory=dict)
    ablations: dict[str, StepAblation] = field(default_factory=dict)
    serving_mix: dict[str, MixReport] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_complete: bool = False

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def write(self, path: Path | None) -> None:
        """Write the JSON so far; a reader never sees half a file."""
        if path is None:
            return
        whole = asdict(self)
        whole["cells"] = {name: self._cell_json(report) for name, report in self.cells.items()}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @staticmethod
    def _cell_json(report: CellReport) -> dict[str, Any]:
        ratios = {
            engine: {peer: report.ratio(engine, peer) for peer in PEERS if report.ratio(engine, peer) is not None}
            for engine in report.rows
        }
        return {**asdict(report), "cell": str(report.cell), "ratios": ratios}


def birth_certificate(command: str, gpu: str, transformers_version: str) -> dict[str, str]:
    """Where, when and from what a report was born."""
    commit = ""
    if shutil.which("git"):
        asked = ["git", "rev-parse", "--short", "HEAD"]
        folder = Path(__file__).parent
        commit = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=folder).stdout.strip()
    return {
        "command": command,
        "device": gpu,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{name: _version_of(name) for name in ("torch", "triton")},
        "transformers": transformers_version,
    }


def gating_line(report: Report) -> str:
    """How the model routes, and which transformers it is compared with, in words."""
    gating = "top-1 gating (Switch's and the paper's)" if report.model["experts_per_token"] == 1 else "top-2 gating (NLLB's)"
    return f"{gating}; transformers {report.certificate['transformers']}"


def table(report: Report) -> str:
    """All cells as text."""
    lines = [
        gating_line(report),
        f"{'cell':>7} {'engine':<13} {'tokens/s':>9} {'ms/step':>8} {'encode ms':>9} {'x transf.':>9} {'x grouped':>9} "
        f"{'paper':>6} {'floor':>6} {'GiB':>6} {'kernels':>7} {'idle us':>7} {'agree':>6}",
    ]
    for cell in report.cells.values():
        lines += [_table_row(cell, row) for row in cell.rows.values()]
        lines.append(f"{cell.cell!s:>7} {experts_line(cell)}")
    return "\n".join(lines)


def experts_line(cell: CellReport) -> str:
    """Distinct experts, in words."""
    line = (
        f"experts touched per sparse layer: decoder step {cell.decoder_experts:.1f} (uniform routing "
        f"{cell.decoder_experts_uniform:.1f}), encoder {cell.encoder_experts:.1f} ({cell.encoder_experts_uniform:.1f})"
    )
    return f"{line}; REFUSED: {cell.refusal}" if cell.refusal else line


def mix_lines(mix: MixReport) -> str:
    """The serving mix as text."""

    def line(name: str, result: StreamResult) -> str:
        return (
            f"  {name:<28} {result.sentences_per_s:9.1f} sentences/s {result.tokens_per_s:9.0f} tokens/s   latency p50 "
            f"{result.latency_p50_s:.3f} s, p99 {result.latency_p99_s:.3f} s   {result.num_steps} steps"
        )

    lines = [
        f"serving mix, {mix.precision}: {mix.num_sentences} sentences, {mix.mean_source_tokens:.0f} source and "
        f"{mix.mean_target_tokens:.0f} target tokens on average, {mix.rows} rows at beam {mix.beam}",
        line("backlog, static batches", mix.backlog_static),
        line("backlog, continuous", mix.backlog_continuous),
        f"  continuous / static = {mix.ratio:.2f}; {mix.equal_share:.1%} of the translations are equal",
        line(f"{mix.stream_sentences_per_s:.1f}/s arrive, static", mix.stream_static),
        line(f"{mix.stream_sentences_per_s:.1f}/s arrive, continuous", mix.stream_continuous),
    ]
    if (gaps := mix.gaps) is not None:
        lines.append(
            f"  device, backlog continuous: {gaps.gapless_share:.1%} of {gaps.num_passes} passes begin within 50 us of the "
            f"one before; gaps median {gaps.median_us:.0f}, p99 {gaps.p99_us:.0f}, longest {gaps.longest_us:.0f} us; busy "
            f"{gaps.busy_share:.1%}"
        )
    return "\n".join(lines)


def plot(report: Report, path: Path) -> None:
    """Bars of tokens/s per cell and engine. Raises ValueError without matplotlib or results."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    engines = list(dict.fromkeys(engine for cell in report.cells.values() for engine in cell.rows))
    if not engines:
        raise ValueError("nothing was measured, so there is nothing to plot")
    figure = Figure(figsize=(1.5 + 1.6 * len(report.cells), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        places = [i for i, cell in enumerate(report.cells.values()) if engine in cell.rows]
        values = [cell.rows[engine].tokens_per_s for cell in report.cells.values() if engine in cell.rows]
        axes.bar([place + (index - (len(engines) - 1) / 2) * width for place in places], values, width, label=engine)
    axes.set_xticks(range(len(report.cells)), [f"{c.cell.batch} x beam {c.cell.beam}" for c in report.cells.values()])
    axes.set_yscale("log")
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"{report.model['name']} on {report.certificate['device']}")
    axes.legend()
    figure.savefig(path, dpi=150)


def _table_row(cell: CellReport, row: EngineRow) -> str:
    transformers, grouped = (cell.ratio(row.engine, peer) for peer in PEERS)
    paper = cell.paper_ratio if row.engine not in PEERS else None
    kernels, idle_us = (None, None) if row.profile is None else (row.profile.kernels, row.profile.idle_us)
    peak_gib = None if row.peak_bytes is None else row.peak_bytes / _GIB
    return (
        f"{cell.cell!s:>7} {row.engine:<13} {row.tokens_per_s:9.0f} {row.step_ms:8.3f} {row.encode_ms:9.2f} "
        f"{_figure(transformers, '.1f'):>9} {_figure(grouped, '.1f'):>9} {_figure(paper, '.1f'):>6} "
        f"{_figure(row.floor_share, '.0%'):>6} {_figure(peak_gib, '.1f'):>6} "
        f"{_figure(kernels, '.0f'):>7} {_figure(idle_us, '.0f'):>7} "
        f"{_figure(row.token_agreement, '.1%'):>6}"
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
