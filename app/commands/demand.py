"""Turn a log of requests into demand per language pair, and learn how long texts become.

Reads a CSV in the order of time, a row a sentence or a sum of several: time_s, src_lang, tgt_lang, source_chars, and where
known sentences, source_tokens, target_tokens. Learns tokens per character and target tokens per source token of each pair;
a pair seen little is drawn towards the other pairs of its source language. What was learnt is kept in --lengths and goes on
with the next log.
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """  babelephant demand monday.csv --lengths lengths.json
  babelephant demand tuesday.csv --lengths lengths.json --out pairs.yaml
  babelephant plan --layout pairs.yaml --gpu L4

A log:
  time_s,src_lang,tgt_lang,source_chars,source_tokens,target_tokens
  1795680000.2,en,de,112,27,31
  1795680000.9,en,ja,64,15,"""

_DAY_S = 86_400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("log", metavar="LOG.csv", type=Path, help="what was asked for, see above")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="lengths learnt so far; read if there, then written")
    parser.add_argument(
        "--half-life",
        type=float,
        metavar="DAYS",
        help="after which traffic counts half, for a new --lengths file (default: for ever)",
    )
    parser.add_argument("--quantile", type=float, default=0.99, help="of a minute's rate, to plan for (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the pairs' demand for `babelephant plan --layout`")


def run(args: argparse.Namespace) -> int:
    """Read, learn, print, write."""
    from app.cli import CommandError
    from app.cost.lengths import PairLengths
    from app.cost.traffic_log import read_log, table
    from app.text.languages import resolve_language

    try:
        if args.lengths and args.lengths.exists():
            if args.half_life is not None:
                raise CommandError(f"{args.lengths} has a half-life already; leave --half-life out, or name a new file")
            lengths = PairLengths.load(args.lengths)
        else:
            lengths = PairLengths(None if args.half_life is None else args.half_life * _DAY_S)
        traffic = read_log(args.log, lengths, lambda code: resolve_language(code).flores, args.quantile)
    except OSError as error:
        raise CommandError(str(error)) from error
    print(table(traffic, lengths))
    if args.lengths:
        lengths.save(args.lengths)
        print(f"lengths of {len(lengths.pairs)} pairs: {args.lengths}")
    if args.out:
        traffic.save(args.out)
        print(f"demand: {args.out}; which pairs share a pool: babelephant plan --layout {args.out}")
    return 0
