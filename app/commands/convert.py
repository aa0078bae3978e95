"""Quantize a checkpoint once, so that replicas start faster and need less disk.

Writes a new directory with packed expert matrices, a manifest and the tokenizer. Serving it gives exactly what quantizing on
load gives; serve it at the precision it was converted to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.config import PRECISIONS, QuantScheme

EXAMPLES = """  babelephant convert /models/nllb-moe-54b /models/nllb-moe-54b-w4a16 --precision w4a16"""

_QUANTIZED = tuple(name for name in PRECISIONS if QuantScheme.from_name(name) is not None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="NLLB-MoE checkpoint in the public format")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; must not exist")
    parser.add_argument("--precision", choices=_QUANTIZED, default="w4a16", help="of the expert weights; default w4a16")


def run(args: argparse.Namespace) -> int:
    """Convert, then say how large the errors are."""
    from safetensors import SafetensorError

    from app.cli import CommandError
    from engine.weights.conversion import convert

    scheme = QuantScheme.from_name(args.precision)
    assert scheme is not None  # argparse let only quantized precisions through
    try:
        manifest = convert(args.checkpoint, args.out, scheme, progress=sys.stderr.isatty())
    except FileExistsError as error:
        raise CommandError(str(error)) from error
    except SafetensorError as error:  # how its writer says that the disk is full
        raise CommandError(f"{args.out} cannot be written, and nothing of it was kept: {error}") from error
    errors = manifest.relative_errors.values()
    print(f"{args.out}: {len(errors)} expert matrices as {scheme.name}, relative error at most {max(errors):.4f}")
    return 0
