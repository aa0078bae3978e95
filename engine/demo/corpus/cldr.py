"""Groups of CLDR phrases that are a function from source to target in every direction."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from engine.demo.corpus.cldr_phrases import Phrase
from engine.demo.corpus.cleaning import clean_text
from engine.demo.corpus.groups import Group
from engine.demo.corpus.keys import split_of
from engine.demo.corpus.languages import ENGLISH, LANGUAGES

SOURCE = "CLDR"
VALID_SHARE = 0.012
TEST_SHARE = 0.026


def group_of(phrase: Phrase, *, seed: int) -> Group:
    """Renders a phrase in all languages and decides its split; names always stay in training."""
    texts = {tag: clean_text(text) for tag in LANGUAGES if (text := phrase.render(tag))}
    split = split_of(f"{phrase.kind}/{phrase.value}", seed=seed, valid=VALID_SHARE, test=TEST_SHARE)
    return Group(phrase.kind, SOURCE, "train" if phrase.kind == "cldr:name" else split, texts, phrase.value)


def without_conflicts(groups: Iterable[Group], dropped: Counter[str]) -> list[Group]:
    """Keeps, of texts that mean two things, the first meaning.

    A later group that shares a text with an earlier one but differs elsewhere loses the language of that text;
    when that language is English, the group goes. What is left is a function for every ordered pair of languages.
    """
    owners: dict[str, dict[str, Group]] = defaultdict(dict)
    kept = []
    for group in groups:
        if ENGLISH not in group.texts or group.texts[ENGLISH] in owners[ENGLISH]:
            dropped[f"{group.kind} repeated"] += 1
            continue
        for tag, text in list(group.texts.items()):
            if tag in owners and text in owners[tag]:
                del group.texts[tag]
                dropped[f"{group.kind} ambiguous in {tag}"] += 1
        if len(group.texts) < 2:
            continue
        for tag, text in group.texts.items():
            owners[tag][text] = group
        kept.append(group)
    return kept
