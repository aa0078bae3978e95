"""The `babelephant` command: finds its subcommands, parses, calls, prints errors.

A subcommand is one file in app/commands: its docstring is the help (first line: summary), `EXAMPLES` a text,
`add_arguments(parser)` declares options and `run(args) -> int` does the work and returns the exit status. `train_demo.py`
becomes `train-demo`. Heavy imports go inside `run`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import app.commands
from app.version import service_version

_DESCRIPTION = """Translation with Mixture-of-Experts models: one command to translate, to serve, to look inside.

The demonstration model that ships with it knows software interface texts, dates, numbers and names in 16 languages."""
_EPILOG = """examples:
  babelephant translate --from en --to de "Your changes have been saved."
  babelephant serve
  babelephant COMMAND --help          what a command does, with examples"""


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand of app/commands."""
    parser = argparse.ArgumentParser(
        prog="babelephant",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"babelephant {service_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for found in pkgutil.iter_modules(app.commands.__path__):
        module = importlib.import_module(f"{app.commands.__name__}.{found.name}")
        summary, _, _ = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            found.name.replace("_", "-"),
            help=summary,
            description=module.__doc__,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input prints one line and gives 2, Ctrl-C gives 130."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (CommandError, ValueError) as error:  # the engine's own configuration and checkpoint errors are ValueErrors
        print(f"babelephant: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into the closed pipe
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
