"""Merges entries into groups: one English text, the translation most packages agree on in every language."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from engine.demo.corpus.catalogs import Entry
from engine.demo.corpus.cleaning import refuse_english, refuse_pair, split_lines
from engine.demo.corpus.keys import Split
from engine.demo.corpus.languages import ENGLISH

INTERFACE: Final = "interface"


@dataclass(slots=True)
class Group:
    """One text in several languages."""

    kind: str  # "interface" or "cldr:<what>"
    source: str
    split: Split
    texts: dict[str, str]  # FLORES-200 tag -> clean text, English always there
    held_value: str = ""  # what a CLDR phrase's split is decided by


def is_interface(group: Group) -> bool:
    """Whether a group comes from interface texts (not generated from CLDR)."""
    return group.kind == INTERFACE


@dataclass(slots=True)
class Merger:
    """Collects clean pairs and counts what was refused."""

    votes: dict[str, dict[str, Counter[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    sources: dict[str, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    pairs_by_source: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        """Splits an entry into lines and votes for every clean pair.

        A translation whose number of lines differs from the English one cannot be aligned and is left out.
        """
        english_lines = split_lines(entry.texts[ENGLISH])
        translations = {tag: split_lines(text) for tag, text in entry.texts.items() if tag != ENGLISH}
        for number, english in enumerate(english_lines):
            if reason := refuse_english(english):
                self.refused[f"english {reason}"] += 1
                continue
            for tag, lines in translations.items():
                if len(lines) != len(english_lines):
                    self.refused["lines"] += 1
                elif refusal := refuse_pair(english, tag, lines[number]):
                    self.refused[refusal] += 1
                else:
                    self.votes[english][tag][lines[number]] += 1
                    self.sources.setdefault(english, entry.source)
                    self.pairs_by_source[entry.source] += 1

    def extend(self, entries: Iterable[Entry]) -> None:
        """Adds many entries."""
        for entry in entries:
            self.add(entry)

    def groups(self) -> list[Group]:
        """All texts that have at least one translation, in order of first sight; ties go to the earlier vote."""
        merged = []
        for english, by_tag in self.votes.items():
            texts = {ENGLISH: english}
            for tag, counter in by_tag.items():
                texts[tag] = counter.most_common(1)[0][0]
            merged.append(Group(INTERFACE, self.sources[english], "train", texts))
        return merged
