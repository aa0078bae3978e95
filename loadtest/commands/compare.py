"""Put runs side by side: before and after, one GPU and another, this tool and an outside one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from loadtest.commands import options
from loadtest.comparison import ComparedFigure, compare_runs
from loadtest.errors import LoadTestError
from loadtest.results import KneeResult, RunResult, load_result

EXAMPLES = """\
  python -m loadtest compare before.json after.json
  python -m loadtest compare before1.json before2.json before3.json --with after1.json after2.json after3.json
  python -m loadtest compare before.json after.json --p99-within 5 --goodput-within 2

With several runs on a side the medians are compared. A knee result counts as its run at the knee.
Exit status: 0, or 1 when a tolerance is exceeded or a run that is judged is not valid."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="base and new, or all base with --with")
    parser.add_argument("--with", dest="new", type=Path, nargs="+", metavar="RESULT.json", help="the new ones")
    parser.add_argument("--p99-within", type=options.number, metavar="PERCENT", help="fail when p99 differs by more")
    parser.add_argument("--goodput-within", type=options.number, metavar="PERCENT", help="fail when goodput differs by more")


def run(args: argparse.Namespace) -> int:
    """Compare and judge."""
    base, new = args.results, args.new
    if new is None:
        if len(base) != 2:
            raise LoadTestError("give two results, or several and `--with` several others")
        base, new = base[:1], base[1:]
    base_runs, new_runs = [_run_of(path) for path in base], [_run_of(path) for path in new]
    figures = compare_runs(base_runs, new_runs)
    _print(figures, len(base_runs), len(new_runs))
    invalid = [run for run in (*base_runs, *new_runs) if not run.valid]
    for run in invalid:
        print(f"NOT VALID: {run.label}: {'; '.join(run.invalid_because)}")
    tolerances = {"p99 ms": args.p99_within, "goodput/s": args.goodput_within}
    judged = {name: limit for name, limit in tolerances.items() if limit is not None}
    exceeded = [line for figure in figures if (line := _exceeds(figure, judged.get(figure.name)))]
    for line in exceeded:
        print(f"FAIL: {line}")
    return 1 if exceeded or (judged and invalid) else 0


def _run_of(path: Path) -> RunResult:
    result = load_result(path)
    if isinstance(result, KneeResult):
        if result.best is None:
            raise LoadTestError(f"{path}: this knee search found no rate that holds; there is no run to compare")
        return result.best
    return result


def _print(figures: Sequence[ComparedFigure], num_base: int, num_new: int) -> None:
    print(f"{'':20}{f'base ({num_base})':>14}{f'new ({num_new})':>14}{'change':>10}")
    for figure in figures:
        base, new = ("–" if value is None else f"{value:.5g}" for value in (figure.base, figure.new))
        change = "–" if figure.change is None else f"{figure.change:+.1%}"
        print(f"{figure.name:20}{base:>14}{new:>14}{change:>10}")


def _exceeds(figure: ComparedFigure, percent: float | None) -> str:
    if percent is None:
        return ""
    if figure.change is None:
        return f"{figure.name} cannot be compared: base {figure.base}, new {figure.new}"
    return (
        f"{figure.name} changed by {figure.change:+.1%}, allowed {percent:g} %" if abs(figure.change) * 100 > percent else ""
    )
