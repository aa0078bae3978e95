"""Show what a checkpoint weighs, and what quantizing its experts saves and costs.

Prints parameter counts, bytes of the expert matrices and of the whole model against fp32, the memory an engine would need,
and the relative error that quantization makes. No device is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from app.precision import default_precision
from app.settings import Environment
from engine.config import PRECISIONS

EXAMPLES = """  babelephant inspect                                     the demonstration model as served (w8a16)
  babelephant inspect --precision w4a16 --precision w4a16-g64
  babelephant inspect /models/nllb-moe-54b --precision w4a16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="NLLB-MoE checkpoint; default: the demo model"
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=PRECISIONS,
        help="of the expert weights; may be repeated; default: that of a converted checkpoint, else w8a16",
    )


def run(args: argparse.Namespace) -> int:
    """Print one report per precision."""
    from engine.weights.inspection import inspect_checkpoint

    checkpoint = args.checkpoint or Environment.read().checkpoint
    print(f"checkpoint       {checkpoint}")
    for precision in args.precision or [default_precision(checkpoint)]:
        print()
        print(inspect_checkpoint(checkpoint, precision))
    return 0
