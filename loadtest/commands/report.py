"""Make the HTML page of a result again."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtest.report import render_report
from loadtest.results import load_result, write_atomically

EXAMPLES = """\
  python -m loadtest report loadtest-run.json
  python -m loadtest report loadtest-knee.json --html knee.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="what `run` or `knee` wrote")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: beside the result")


def run(args: argparse.Namespace) -> int:
    """Read, render, write."""
    path = args.html or args.result.with_suffix(".html")
    write_atomically(path, render_report(load_result(args.result)))
    print(f"written: {path}")
    return 0
