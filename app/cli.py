"""The `babelephant` command: finds its subcommands, parses, calls, prints errors.

A subcommand is one file in app/commands: its docstring is the help (first line: summary), `EXAMPLES` a text,
`add_arguments(parser)` declares options and `run(args) -> int` does the work and returns the exit status. `train_demo.py`
becomes `train-demo`. Heavy imports go inside `run`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import yaml
from pydantic import ValidationError

import app.commands
from app.invalid_fields import invalid_fields
from app.version import service_version

_DESCRIPTION = """Translation with Mixture-of-Experts models: one command to translate, to serve, to look inside.

The demonstration model that ships with it knows software interface texts, dates, numbers and names in 16 languages."""
_EPILOG = """examples:
  babelephant translate --from en --to de "Your changes have been saved."
  babelephant serve
  babelephant COMMAND --help          what a command does, with examples"""

# Modules that serving does not need, and the extra of pyproject.toml that brings them.
EXTRA_OF_MODULE = {
    "matplotlib": "evaluate",
    "sacrebleu": "evaluate",
    "babel": "demo",
    "polib": "demo",
    "sentencepiece": "demo",
    "transformers": "demo",
}


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
    """Run the command line; returns the exit status: 2 with one message for what the caller can mend, 130 for Ctrl-C.

    A fault of our own keeps its stack trace.
    """
    args = build_parser().parse_args(argv)
    try:
        with _clean_end():
            return int(args.run(args))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into the closed pipe
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"babelephant: error: {message}", file=sys.stderr)
        return 2


def _message(error: Exception) -> str | None:
    """What to tell the caller; None for a fault of our own."""
    message = None
    match error:
        case ValidationError():
            message = f"{error.title}: {invalid_fields(error)}"
        case yaml.YAMLError():
            message = f"this is not valid YAML: {error}"
        case OSError() if error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        case ModuleNotFoundError(name=name) if name in EXTRA_OF_MODULE:
            install = f"{sys.executable} -m pip install -c constraints.txt -e '.[{EXTRA_OF_MODULE[name]}]'"
            message = f"{name} is not installed, which this needs; in the project's folder: {install}"
        case CommandError() | ValueError() | OSError():  # the engine's configuration and checkpoint errors are ValueErrors
            message = str(error)
        case RuntimeError() if type(error).__module__.startswith("engine."):  # the engine's own, such as too little memory
            message = str(error)
    return message


@contextlib.contextmanager
def _clean_end() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless nohup ignores it, unwind the stack, so that half-written folders are removed on the way."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signals = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for signum in signals:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in signals:
            signal.signal(signum, signal.SIG_DFL)


if __name__ == "__main__":
    from app.cli import main as main_of_app_cli  # this file's second copy: commands raise the CommandError of app.cli

    sys.exit(main_of_app_cli())
