"""The test texts that ship: a sample of the test split that favours texts with many languages."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from engine.demo.corpus.groups import Group, is_interface
from engine.demo.corpus.keys import digest
from engine.demo.corpus.languages import ENGLISH

MAX_INTERFACE: Final = 1500
MAX_PHRASES: Final = 1200


def record_of(number: int, group: Group) -> dict[str, Any]:
    """A group as one line of JSON."""
    return {
        "id": number, "kind": group.kind, "source": group.source, "split": group.split, "texts": group.texts,
    }  # fmt: skip


def write_records(path: Path, groups: Iterable[Group]) -> None:
    """One group a line; the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record_of(n, g), ensure_ascii=False) + "\n" for n, g in enumerate(groups))
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file written by `write_records`."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def choose_heldout(groups: Iterable[Group]) -> list[Group]:
    """At most 1,500 interface texts, most languages first, and 1,200 phrases spread over their kinds."""
    interface: list[Group] = []
    by_kind: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.split == "test":
            (interface if is_interface(group) else by_kind[group.kind]).append(group)
    interface.sort(key=lambda g: (-len(g.texts), digest(g.texts[ENGLISH])))
    phrases: list[Group] = []
    remaining = sorted(by_kind.items(), key=lambda item: (len(item[1]), item[0]))
    for number, (_, of_kind) in enumerate(remaining):
        # Small kinds give all they have; what they leave goes to the larger ones.
        share = (MAX_PHRASES - len(phrases)) // (len(remaining) - number)
        of_kind.sort(key=lambda g: digest(g.texts[ENGLISH]))
        phrases += of_kind[:share]
    return interface[:MAX_INTERFACE] + phrases
