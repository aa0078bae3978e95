"""The command `python -m loadtest`: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loadtest.commands import closed, compare, knee, report, run
from loadtest.errors import LoadTestError

_COMMANDS = {"run": run, "knee": knee, "closed": closed, "report": report, "compare": compare}
_ABOUT = """\
Load tests for a translation service that speaks POST /v1/translate; all but `closed` are open-loop.

When each request is sent is fixed before the run, and latency counts from that moment: a service that stalls cannot slow
the test down and so hide its stall. Every run proves that the client kept its schedule, or says that it is not valid."""
_START = """\
start here, with a service on this machine (`make run`):
  python -m loadtest run --rate 5 --duration 30      how does it do at 5 requests/s?
  python -m loadtest knee                            how much can it take within its SLO?
  python -m loadtest closed --clients 1,32,256       how many requests/s at so many clients?
  python -m loadtest compare before.json after.json  did a change help?

Operators who want a web page, several load machines or hand-made shapes: locust -f loadtest/locustfile.py"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m loadtest", description=_ABOUT, epilog=_START, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").strip()
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=formatter,
        )
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: the subcommand's, 2 for bad input, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return int(_COMMANDS[args.command].run(args))
    except LoadTestError as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loadtest: interrupted", file=sys.stderr)
        return 130
