"""Decide a live run's log again and compare every bit.

The autoscaling policy writes each decision with all it depended on (`log_path` in the Serve YAML). This runs the same code
over the same readings: equal decisions prove that nothing else played a part, different ones show what a changed program
would have done. The summary says per pool what was decided and why.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

EXAMPLES = """  babelephant replay-decisions /var/lib/babelephant/decisions.jsonl

Exit status 0 when all decisions are equal, 1 when one is not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("log", metavar="FILE", type=Path, help="decision log of the autoscaling policy")


def run(args: argparse.Namespace) -> int:
    """Verify and print."""
    from app.autoscaling.decision_log import verify
    from app.cli import CommandError

    try:
        verdict = verify(args.log)
    except OSError as error:
        raise CommandError(f"{error}; log_path in the Serve YAML names the log") from error
    if verdict.num_decisions:
        print(_summary(args.log))
    if verdict.num_different:
        print(
            f"{verdict.num_different} of {verdict.num_decisions} decisions differ, the first in line {verdict.first_line}:"
        )
        print(verdict.first_difference)
        return 1
    print(f"{verdict.num_decisions} decisions, all equal bit for bit")
    return 0


def _summary(path: Path) -> str:
    from app.autoscaling.decision_log import read_log

    settings, records = read_log(path)
    logged = list(records)
    lines = [f"{'pool':<20} {'fewest':>6} {'mean':>6} {'most':>6}  reasons"]
    for index, name in enumerate(settings.pools):
        targets = [record["target"][index] for record in logged]
        reasons = Counter(record["reason"][index] for record in logged)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        lines.append(f"{name:<20} {min(targets):>6} {sum(targets) / len(targets):>6.2f} {max(targets):>6}  {why}")
    return "\n".join(lines)
