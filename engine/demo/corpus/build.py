"""Builds the demonstration corpus: fetch, read, clean, merge, split, learn the vocabulary."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from engine.demo.corpus.archives import fetch
from engine.demo.corpus.catalogs import Entry, read_gettext, read_keyed
from engine.demo.corpus.cldr import group_of, without_conflicts
from engine.demo.corpus.cldr_values import all_phrases
from engine.demo.corpus.groups import Group, Merger
from engine.demo.corpus.heldout import choose_heldout, write_records
from engine.demo.corpus.keys import write_digests
from engine.demo.corpus.languages import LANGUAGES
from engine.demo.corpus.sources import SOURCES
from engine.demo.corpus.splits import split_interface, train_digests, without_crossings
from engine.demo.corpus.vocabulary import TOTAL_IDS, save_tokenizer, train_pieces, training_sample
from engine.demo.corpus.vscode import read_vscode

NUM_PHRASES: Final = 64_000
DEMO_FOLDER: Final = Path(__file__).parents[1]


@dataclass(slots=True)
class CorpusReport:
    """What was built, in numbers."""

    seed: int
    vocab_size: int = TOTAL_IDS
    groups: dict[str, int] = field(default_factory=dict)  # "kind split" -> groups
    texts: dict[str, dict[str, int]] = field(default_factory=dict)  # language -> kind -> texts
    pairs_by_source: dict[str, int] = field(default_factory=dict)  # clean pairs with English before merging
    texts_by_source: dict[str, dict[str, int]] = field(default_factory=dict)  # source -> language -> texts kept
    refused: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    heldout: int = 0


def read_sources(downloads: Path) -> Iterator[Entry]:
    """Entries of all pinned packages, in the order of the list."""
    from tqdm import tqdm

    seen_vscode = False
    for source in tqdm(SOURCES, desc="read packages", unit="package", mininterval=2):
        if source.catalog_format != "vscode":
            read = read_gettext if source.catalog_format == "po" else read_keyed
            yield from read(source, fetch(source, downloads))
        elif not seen_vscode:
            seen_vscode = True
            yield from read_vscode(downloads)


def collect_groups(downloads: Path, report: CorpusReport) -> list[Group]:
    """All groups of all kinds with their splits."""
    from tqdm import tqdm

    merger = Merger()
    merger.extend(read_sources(downloads))
    report.pairs_by_source = dict(merger.pairs_by_source.most_common())
    report.refused = dict(merger.refused.most_common())
    dropped: Counter[str] = Counter()
    rendered = (group_of(phrase, seed=report.seed) for phrase in all_phrases(NUM_PHRASES, seed=report.seed))
    phrases = without_conflicts(tqdm(rendered, desc="CLDR phrases", unit="phrase", mininterval=2), dropped)
    interface = merger.groups()
    split_interface(interface, seed=report.seed)
    groups = without_crossings(interface, phrases, dropped)
    random.Random(report.seed).shuffle(groups)
    report.dropped = dict(dropped.most_common())
    return groups


def count(groups: list[Group], report: CorpusReport) -> None:
    """Fills the counts of groups and texts."""
    texts: dict[str, Counter[str]] = {tag: Counter() for tag in LANGUAGES}
    by_source: dict[str, Counter[str]] = {}
    for group in groups:
        for tag in group.texts:
            texts[tag][group.kind] += 1
        by_source.setdefault(group.source, Counter()).update(group.texts.keys())
    report.groups = dict(sorted(Counter(f"{group.kind} {group.split}" for group in groups).items()))
    report.texts = {tag: dict(counter.most_common()) for tag, counter in texts.items()}
    report.texts_by_source = {source: dict(counter) for source, counter in by_source.items()}


def build_corpus(out_dir: Path, *, downloads: Path, seed: int) -> CorpusReport:
    """Build everything: texts and report in `out_dir`; tokenizer, held-out texts and hashes in place."""
    out_dir.mkdir(parents=True, exist_ok=True)
    report = CorpusReport(seed)
    groups = collect_groups(downloads, report)
    count(groups, report)
    write_records(out_dir / "texts.jsonl.gz", groups)
    heldout = choose_heldout(groups)
    report.heldout = len(heldout)
    write_records(DEMO_FOLDER / "heldout.jsonl.gz", heldout)
    write_digests(DEMO_FOLDER / "train_keys.bin", train_digests(groups))
    with tempfile.TemporaryDirectory() as folder:
        model = train_pieces(training_sample(groups, seed=seed), Path(folder))
        save_tokenizer(model, DEMO_FOLDER / "checkpoint")
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    (out_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    return report
