"""Keys of English texts: what counts as "the same text", which split it falls into, and the list that ships."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from engine.demo.corpus.marks import without_marks

Split = Literal["train", "valid", "test"]
_WORD: Final = re.compile(r"[^\W\d_]+")
_VALUE: Final = re.compile(r"[^\W_]+")
_BITS: Final = 28  # few enough for a small file, enough that hardly any held-out text meets a hash by chance


def letters_key(english: str) -> str:
    """Lower-case words without marks, digits, punctuation and plural "s": near-duplicates share it."""
    words = _WORD.findall(without_marks(english).lower().replace("'", "").replace("’", ""))
    if not words:  # code quotes or tags were all there is
        words = _WORD.findall(english.lower())
    return " ".join(word.removesuffix("s") if len(word) > 3 else word for word in words)


def value_key(english: str) -> str:
    """Lower-case words and digits: tells "3 March" from "4 March", not "3 March" from "3 march."."""
    return " ".join(_VALUE.findall(english.lower()))


def digest(key: str) -> int:
    """28-bit hash of a key; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> (32 - _BITS)


def split_of(key: str, *, seed: int, valid: float, test: float) -> Split:
    """The split of a key: shares `valid` and `test` of all keys, decided by the key alone."""
    place = digest(f"{seed}/{key}") / (1 << _BITS)
    if place < test:
        return "test"
    return "valid" if place < test + valid else "train"


def digests_of(kind: str, english: str) -> list[int]:
    """Hashes under which a group's English text counts as seen: by value always, by letters for interface texts."""
    found = [digest("value:" + value_key(english))]
    if not kind.startswith("cldr:"):
        found.append(digest("letters:" + letters_key(english)))
    return found


def write_digests(path: Path, digests: Iterable[int]) -> None:
    """Sorted distinct hashes as compressed differences (uint32), all low bytes first."""
    ordered = np.array([0, *sorted(set(digests))], dtype="<u4")
    planes = np.diff(ordered).astype("<u4").view(np.uint8).reshape(-1, 4).T
    path.write_bytes(zlib.compress(np.ascontiguousarray(planes).tobytes(), 9))


def read_digests(path: Path) -> NDArray[np.uint32]:
    """Sorted hashes [N] as written by `write_digests`."""
    planes = np.frombuffer(zlib.decompress(path.read_bytes()), dtype=np.uint8).reshape(4, -1)
    differences = np.ascontiguousarray(planes.T).view("<u4").ravel()
    return np.cumsum(differences, dtype=np.uint32)
