"""Score a checkpoint on the held-out texts that ship with the project.

Translates interface texts and CLDR phrases that the demonstration model has never seen; prints chrF and BLEU (sacrebleu),
exact match and the share of outputs that keep every placeholder and tag, one row per precision.
"""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path

from app.devices import require_device
from app.precision import default_precision
from app.settings import Environment
from engine.config import PRECISIONS, EngineConfig
from engine.types import SearchOptions

EXAMPLES = """  babelephant evaluate --pair eng_Latn-deu_Latn --limit 100      one direction, a minute
  babelephant evaluate --precision bf16 --precision w8a16 --precision w4a16
  babelephant evaluate --all --limit 100 --cldr-limit 50 --out quality.json
  babelephant evaluate --device cuda --int8-dense               the rows of w4a16+d8: what int8 dense layers cost"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="default: the demonstration model")
    parser.add_argument(
        "--precision",
        action="append",
        choices=PRECISIONS,
        help="of the expert weights; may be repeated; default: that of a converted checkpoint, else w4a16",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--pair", action="append", metavar="SRC-TGT", help="FLORES-200 codes; may be repeated")
    which.add_argument("--all", action="store_true", help="all ordered pairs (default: the 30 with English)")
    parser.add_argument("--limit", type=int, default=200, help="interface texts per direction (%(default)s)")
    parser.add_argument("--cldr-limit", type=int, default=200, help="CLDR phrases per direction (%(default)s)")
    parser.add_argument("--beam-size", type=int, default=4, help="%(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--int8-dense",
        action="store_true",
        help="the decoder's widest dense maps and the output projection in int8 as well (GPU only; `+d8` in the table)",
    )
    parser.add_argument("--out", type=Path, help="write every direction's scores here as JSON")


def run(args: argparse.Namespace) -> int:
    """Translate, score, print the table."""
    from engine.demo.evaluation import directions_of, evaluate, report, table
    from engine.translator import Translator

    if args.out and not args.out.parent.is_dir():  # known now, not after the hour that it may take
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(args.out.parent))
    require_device(args.device)
    checkpoint = args.checkpoint or Environment.read().checkpoint
    if args.int8_dense:
        _require_int8_dense(checkpoint, args.device)
    search = SearchOptions(beam_size=args.beam_size)
    scores = {}
    for precision in args.precision or [default_precision(checkpoint, "w4a16")]:
        config = EngineConfig(device=args.device, precision=precision, int8_dense=args.int8_dense)
        label = precision + "+d8" * args.int8_dense  # as `babelephant bench` names it
        translator = Translator.load(checkpoint, config)
        if args.pair:
            directions = [tuple(pair.split("-", 1)) for pair in args.pair]
            if any(len(direction) != 2 for direction in directions):
                raise ValueError("--pair wants two language codes, such as eng_Latn-deu_Latn")
        else:
            directions = directions_of(translator.languages, pivot_only=not args.all)
        scores[label] = evaluate(
            translator, directions, limits={"interface": args.limit, "cldr": args.cldr_limit}, search=search, label=label
        )
        if not scores[label]:
            raise ValueError("no held-out text exists for these pairs; `babelephant evaluate --help` shows how to name them")
    result = report(scores, search)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for title in ("with_english", "all_directions"):
        if all(parts.keys() >= {"interface", "cldr"} for parts in result[title].values()):
            print(f"\n{title.replace('_', ' ')}\n{table(result[title])}")
    return 0


def _require_int8_dense(checkpoint: Path, device: str) -> None:
    """Only the kernels on a GPU have int8 dense layers; the table would show an engine without them. Raises ValueError."""
    from engine.config import ModelConfig
    from engine.device_runner import supports_kernels

    if not device.startswith("cuda"):
        raise ValueError(f"--int8-dense works on a GPU only, not on {device}: add --device cuda, or leave it out")
    if not supports_kernels(ModelConfig.from_checkpoint(checkpoint)):
        raise ValueError(
            f"--int8-dense: the kernels cannot run the heads of {checkpoint}, and nothing else has int8 dense layers"
        )
