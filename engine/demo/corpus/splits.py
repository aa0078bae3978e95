"""Decides train, valid and test, so that no text of one shows up in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.demo.corpus.groups import Group
from engine.demo.corpus.keys import digests_of, letters_key, split_of, value_key
from engine.demo.corpus.languages import ENGLISH

VALID_SHARE = 0.015
TEST_SHARE = 0.03


def split_interface(groups: Iterable[Group], *, seed: int) -> None:
    """Sets the split of interface groups by the letters of their English text: near-duplicates stay together."""
    for group in groups:
        key = letters_key(group.texts[ENGLISH])
        group.split = split_of(key, seed=seed, valid=VALID_SHARE, test=TEST_SHARE)


def without_crossings(interface: list[Group], phrases: list[Group], dropped: Counter[str]) -> list[Group]:
    """All groups, less those whose English text would be seen in two splits or in two groups.

    An interface text that is also a CLDR phrase ("Germany") stays once, as the phrase. Of texts that share a hash
    across splits, the held-out one goes.
    """
    taken = {value_key(group.texts[ENGLISH]) for group in phrases}
    groups = list(phrases)
    for group in interface:
        if value_key(group.texts[ENGLISH]) in taken:
            dropped["interface text is a CLDR phrase"] += 1
        else:
            groups.append(group)
    seen: set[int] = set()
    kept: set[int] = set()
    for split in ("train", "test", "valid"):
        of_split: set[int] = set()
        for group in groups:
            if group.split != split:
                continue
            digests = digests_of(group.kind, group.texts[ENGLISH])
            if seen.isdisjoint(digests):
                kept.add(id(group))
                of_split.update(digests)
            else:
                dropped[f"{split} text seen in another split"] += 1
        seen |= of_split
    return [group for group in groups if id(group) in kept]


def train_digests(groups: Iterable[Group]) -> set[int]:
    """Hashes of everything the model trains on."""
    return {
        digest
        for group in groups
        if group.split == "train"
        for digest in digests_of(group.kind, group.texts[ENGLISH])
    }  # fmt: skip
