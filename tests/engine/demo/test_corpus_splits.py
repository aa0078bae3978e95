"""No held-out text is trained on, also in what ships."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from engine.demo.corpus.groups import Group
from engine.demo.corpus.keys import (
    digests_of,
    letters_key,
    read_digests,
    split_of,
    value_key,
    write_digests,
)
from engine.demo.corpus.languages import LANGUAGES
from engine.demo.corpus.splits import split_interface, train_digests, without_crossings

DEMO = Path(__file__).parents[3] / "engine" / "demo"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Add device", "add devices!"),
        ("Sensor 1", "Sensor 12"),
        ("Delete {name}?", "Delete {{title}}"),
        ("<b>Bold</b> move", "Bold   move"),
    ],
)
def test_near_duplicates_share_the_letters_key(one: str, other: str) -> None:
    assert letters_key(one) == letters_key(other)


def test_value_key_tells_values_apart() -> None:
    assert value_key("March 3, 2024") == value_key("march 3 2024")
    assert value_key("March 3, 2024") != value_key("March 4, 2024")


def test_split_shares_are_about_right_and_stable() -> None:
    splits = Counter(split_of(str(n), seed=1, valid=0.1, test=0.2) for n in range(5000))
    assert abs(splits["valid"] / 5000 - 0.1) < 0.02
    assert abs(splits["test"] / 5000 - 0.2) < 0.02
    assert split_of("a", seed=1, valid=0.1, test=0.2) == split_of("a", seed=1, valid=0.1, test=0.2)


def test_nothing_crosses_after_merging() -> None:
    interface = [
        Group("interface", "a", "train", {"eng_Latn": f"{word} the {thing}{end}", "deu_Latn": "x"})
        for word in ("Open", "Close", "Move", "Copy", "{n}")
        for thing in ("file", "door", "window", "list", "row", "page")
        for end in ("", "s", "!", " 12")
    ]
    split_interface(interface, seed=3)
    for group in interface[::7]:  # as if another package's text had fallen elsewhere
        group.split = "test"
    phrases = [Group("cldr:name", "CLDR", "train", {"eng_Latn": "Open the file", "deu_Latn": "y"})]
    dropped: Counter[str] = Counter()
    groups = without_crossings(interface, phrases, dropped)
    by_split = {
        split: {d for g in groups if g.split == split for d in digests_of(g.kind, g.texts["eng_Latn"])}
        for split in ("train", "valid", "test")
    }
    assert by_split["train"] == train_digests(groups)
    assert not by_split["train"] & by_split["test"]
    assert not by_split["valid"] & (by_split["train"] | by_split["test"])
    assert dropped["interface text is a CLDR phrase"] == 2  # with and without "!"


def test_digests_survive_the_file(tmp_path: Path) -> None:
    write_digests(tmp_path / "keys.bin", [5, 3, 5, 268_435_455, 0])
    assert read_digests(tmp_path / "keys.bin").tolist() == [0, 3, 5, 268_435_455]


def test_no_shipped_heldout_text_was_trained_on() -> None:
    train = set(read_digests(DEMO / "train_keys.bin").tolist())
    assert len(train) > 100_000
    with gzip.open(DEMO / "heldout.jsonl.gz", "rt", encoding="utf-8") as handle:
        records = [json.loads(line) for line in handle]
    assert len(records) > 2_000
    for record in records:
        english = record["texts"]["eng_Latn"]
        assert record["split"] == "test"
        assert set(record["texts"]) <= set(LANGUAGES)
        assert train.isdisjoint(digests_of(record["kind"], english)), english
    assert (DEMO / "train_keys.bin").stat().st_size <= 400_000
    assert (DEMO / "heldout.jsonl.gz").stat().st_size <= 2_000_000
