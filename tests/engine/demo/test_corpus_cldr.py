"""CLDR phrases translate to one text only, in every direction, and are held out by value."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from decimal import Decimal
from itertools import permutations
from pathlib import Path

import pytest

pytest.importorskip("babel", reason="babel writes the phrases: babelephant[demo]")

from engine.demo.corpus.cldr import group_of, without_conflicts
from engine.demo.corpus.cldr_phrases import Phrase, currency_phrase, relative_phrase, unit_phrase
from engine.demo.corpus.cldr_values import all_phrases
from engine.demo.corpus.groups import Group
from engine.demo.corpus.languages import LANGUAGES

HELDOUT = Path(__file__).parents[3] / "engine" / "demo" / "heldout.jsonl.gz"


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return without_conflicts((group_of(phrase, seed=5) for phrase in all_phrases(1500, seed=5)), Counter())


def _assert_function(texts_of_groups: list[dict[str, str]]) -> None:
    for source, target in permutations(LANGUAGES, 2):
        seen: dict[str, str] = {}
        for texts in texts_of_groups:
            if source in texts and target in texts:
                assert seen.setdefault(texts[source], texts[target]) == texts[target], (source, target, texts)


def test_generated_phrases_are_a_function(groups: list[Group]) -> None:
    assert len(groups) > 5_000
    _assert_function([group.texts for group in groups])


def test_shipped_phrases_are_a_function() -> None:
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as handle:
        records = [json.loads(line) for line in handle]
    _assert_function([record["texts"] for record in records if record["kind"] != "interface"])


def test_values_do_not_cross_within_a_kind(groups: list[Group]) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for group in groups:
        splits.setdefault((group.kind, group.held_value), set()).add(group.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {group.split for group in groups if group.kind == "cldr:name"} == {"train"}


def test_the_same_seed_gives_the_same_phrases(groups: list[Group]) -> None:
    again = without_conflicts((group_of(phrase, seed=5) for phrase in all_phrases(1500, seed=5)), Counter())
    assert [group.texts for group in again] == [group.texts for group in groups]


def test_later_meanings_of_a_text_go() -> None:
    tables = [{"eng_Latn": "a", "deu_Latn": "x"}, {"eng_Latn": "b", "deu_Latn": "x", "fra_Latn": "z"}, {"eng_Latn": "a"}]
    groups = [Group("cldr:name", "CLDR", "train", dict(table)) for table in tables]
    kept = without_conflicts(groups, Counter())
    assert [group.texts for group in kept] == [tables[0], {"eng_Latn": "b", "fra_Latn": "z"}]


@pytest.mark.parametrize(
    ("phrase", "tag", "text"),
    [
        (relative_phrase(3, "day"), "eng_Latn", "in 3 days"),
        (relative_phrase(-3, "day"), "ces_Latn", "před 3 dny"),
        (unit_phrase(Decimal("4"), "area-hectare"), "zho_Hans", "4公顷"),
        (unit_phrase(Decimal("2.5"), "length-kilometer"), "deu_Latn", "2,5 Kilometer"),
        (currency_phrase(Decimal("1234.5"), "EUR", "name"), "fra_Latn", "1 234,50 euros"),
    ],
)
def test_known_phrases(phrase: Phrase, tag: str, text: str) -> None:
    assert group_of(phrase, seed=1).texts[tag] == text
