"""Arguments of the training command; `babelephant train-demo` is the same parser."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from engine.demo.training.options import TrainingOptions

EXAMPLES = """  babelephant train-demo --total-seconds 1000                      one run, about 17 minutes on an H200
  babelephant train-demo --total-seconds 1000 --run-seconds 550    the first part; the same line again continues it
Continues from OUT/state.pt (exact: schedule, moments) or, where only OUT/checkpoint came along, from its weights.
OUT receives checkpoint/ (NLLB-MoE format), state.pt, training_log.jsonl and options.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the training to a parser."""
    default = {field.name: field.default for field in fields(TrainingOptions)}
    add = parser.add_argument
    add(
        "--corpus",
        type=Path,
        default=Path(".corpus/texts.jsonl.gz"),
        help="built by `babelephant demo-corpus` (%(default)s)",
    )
    add("--tokenizer", type=Path, default=Path("engine/demo/checkpoint"), help="directory with tokenizer.json (%(default)s)")
    add("--out", type=Path, default=Path(".runs/demo"), help="directory of this training (%(default)s)")
    add("--total-seconds", type=float, required=True, help="training time of all runs together: sets the schedule")
    add("--run-seconds", type=float, help="end this run after so many seconds (default: at the total)")
    for name, kind, text in (
        ("learning_rate", float, "peak learning rate"),
        ("dropout", float, "dropout probability"),
        ("rows", int, "rows of 128 positions per step"),
        ("cldr_share", float, "share of CLDR phrases among drawn pairs"),
        ("pivot_weight", float, "how much likelier English is drawn than another language"),
        ("num_variants", int, "segmentations per interface text, the plain one included"),
        ("bpe_dropout", float, "probability of dropping a merge in the other segmentations"),
        ("weight_decay", float, "decoupled weight decay of matrices"),
        ("seed", int, "seed of weights and draws"),
        ("validate_every_s", float, "seconds between validations"),
    ):
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, default=default[name], help=f"{text} (%(default)s)")
    add("--device", default="cuda", help="cuda, cuda:1 or cpu (cpu: for trying the command only) (%(default)s)")
    add("--no-compile", dest="compile", action="store_false", help="skip torch.compile: half the speed, no compile time")


def run(arguments: argparse.Namespace) -> int:
    """Train with parsed arguments and print the last log record."""
    from engine.demo.training.trainer import Trainer

    names = TrainingOptions.__dataclass_fields__
    options = TrainingOptions(**{name: value for name, value in vars(arguments).items() if name in names})
    print(json.dumps(Trainer(options).run()))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(
        prog="babelephant train-demo",
        description="Train the demonstration model.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args(argv)))
