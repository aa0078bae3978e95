"""Measure which experts each language pair's decode steps touch, for `plan --layout`.

Translates sentences with a checkpoint and counts the rows that every expert of every sparse decoder layer gets. Pairs that
use the same few experts are cheap to serve together, pairs that share none are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.devices import require_device
from app.precision import default_precision
from app.settings import Environment
from engine.config import PRECISIONS, EngineConfig, ModelConfig
from engine.types import SearchOptions

if TYPE_CHECKING:
    from app.cost.expert_usage import ExpertUsage
    from app.cost.traces import Floats

EXAMPLES = """  babelephant experts --out experts.json                        the 30 directions with English, a minute
  babelephant experts --pair en-de --pair en-ja --limit 40
  babelephant experts /models/nllb-moe-54b --device cuda --texts sentences.yaml --pair en-de --out experts.json

sentences.yaml holds texts by source language:
  eng_Latn: ["Save", "Choose a folder for the backup"]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="default: the demonstration model")
    parser.add_argument("--pair", action="append", metavar="SRC-TGT", help="may be repeated (default: those with English)")
    parser.add_argument("--texts", type=Path, metavar="YAML", help="texts by source language (default: held-out texts)")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="texts a pair (%(default)s)")
    parser.add_argument("--beam-size", type=int, default=4, metavar="N", help="%(default)s")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the expert weights (default: that of a converted checkpoint, else w8a16)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, in plain torch (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counts here")


def run(args: argparse.Namespace) -> int:
    """Translate, count, print, write."""
    from tqdm import tqdm

    from app.cost.expert_usage import ExpertUsage
    from engine.expert_counts import count_experts

    if args.limit < 1 or args.threads < 1:
        raise ValueError("--limit and --threads are at least 1")
    require_device(args.device)
    checkpoint = args.checkpoint or Environment.read().checkpoint
    texts = _texts(args, checkpoint)
    precision = args.precision or default_precision(checkpoint)
    config = EngineConfig(device=args.device, precision=precision, num_threads=args.threads)
    counted = count_experts(checkpoint, texts, config, SearchOptions(beam_size=args.beam_size))
    found = list(tqdm(counted, total=len(texts), unit="pair", desc="experts", disable=None))
    what = f"{sum(map(len, texts.values()))} texts of {len(texts)} pairs, beam {args.beam_size}, {precision}"
    name = checkpoint.name if args.checkpoint else "demonstration model"
    counts = {"-".join(pair): rows.astype(float) for pair, _, rows in found}
    experts_per_token = ModelConfig.from_checkpoint(checkpoint).num_experts_per_tok
    usage = ExpertUsage(name, found[0][2].shape[1], found[0][1], counts, what, experts_per_token)
    print(_table(usage))
    if args.out:
        usage.save(args.out)
        print(f"written to {args.out}; which pairs share a pool: babelephant plan --layout PAIRS --experts {args.out}")
    return 0


def _texts(args: argparse.Namespace, checkpoint: Path) -> dict[tuple[str, str], Sequence[str]]:
    """Texts of each pair, at most --limit."""
    import yaml

    from app.routing import parse_pattern
    from engine.demo.evaluation import directions_of, read_heldout
    from engine.tokenizer import Tokenizer

    by_language: dict[str, list[str]] = {}
    if args.texts:
        by_language = yaml.safe_load(args.texts.read_text(encoding="utf-8"))
        if not isinstance(by_language, dict) or not all(isinstance(texts, list) for texts in by_language.values()):
            raise ValueError(f"{args.texts}: must hold a list of texts by source language (FLORES-200)")
    else:
        for group in read_heldout():
            for language, text in group["texts"].items() if group["kind"] == "interface" else ():
                by_language.setdefault(language, []).append(text)
    if args.pair:
        pairs = [(pattern.src_lang, pattern.tgt_lang) for pattern in map(parse_pattern, args.pair)]
    else:
        pairs = directions_of(Tokenizer.from_checkpoint(checkpoint).languages, pivot_only=True)
    if missing := sorted({source for source, _ in pairs if not by_language.get(source)}):
        raise ValueError(f"no texts in {', '.join(missing)}; --texts FILE brings some")
    return {pair: by_language[pair[0]][: args.limit] for pair in pairs}


def _table(usage: ExpertUsage) -> str:
    """Experts used by each pair alone, and by all together."""
    import numpy as np

    from app.cost.expert_usage import experts_used

    def used(shares: Floats) -> float:
        return experts_used(shares, usage.experts_per_token)

    lines = [f"{'pair':<22} {'rows':>8}  experts used: that many of {usage.num_experts}, used evenly, are touched as often"]
    lines += [
        f"{pair:<22} {int(counts[0].sum()) // usage.experts_per_token:>8}  {used(usage.shares(pair)):.1f}"
        for pair, counts in usage.counts.items()
    ]
    together = np.mean([usage.shares(pair) for pair in usage.counts], axis=0)
    return "\n".join([*lines, f"{'all, evenly mixed':<22} {'':>8}  {used(together):.1f}"])
