"""Placeholders, tags and other marks of a text that a translation must carry over unchanged."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

_MARK: Final = re.compile(
    r"https?://[^\s\"'<>)\]]+"
    r"|</?[A-Za-z][^<>]*>|</?\d+/?>"
    r"|\{\{[^{}]*\}\}|\$?\{[^{}]*\}|\[\[[^\[\]]*\]\]"
    r"|%\([^()\s]+\)[-#0-9.]*[a-zA-Z]|%\{[^{}]*\}|%\d+\$[a-z]|%[sdifr](?![A-Za-z])|%\d+(?!\d*\s*%)"
    r"|\$\([\w~-]+\)|\$t\([^)]*\)|\$\w+\$"
    r"|&[a-z]+;|&#\d+;"
    r"|`[^`]*`|`"
    r"|__\w+__"
)
_DIGITS: Final = re.compile(r"\d{2,}")
_SPACE: Final = re.compile(r"\s+")
_CODE: Final = re.compile(r"^[\w./:@#$%&*+=?!,;()\[\]{}<>|\\^~\"'`-]*$")


def marks_of(text: str) -> Counter[str]:
    """Counts of the marks in `text`; the inside of code quotes and tags is compared without white space."""
    return Counter(_SPACE.sub("", mark) if mark[0] != "`" else "`" for mark in _MARK.findall(text))


def without_marks(text: str) -> str:
    """`text` with every mark replaced by a space."""
    return _MARK.sub(" ", text)


def same_marks(english: str, translation: str) -> bool:
    """Whether the translation carries the same marks, and every number of two digits or more."""
    if marks_of(english) != marks_of(translation):
        return False
    missing = Counter(_DIGITS.findall(english)) - Counter(_DIGITS.findall(translation))
    return not missing


def is_code(english: str) -> bool:
    """Whether nothing is there to translate: an address, an identifier, marks only."""
    words = without_marks(english)
    if not any(letter.isalpha() for letter in words):
        return True
    if " " in english.strip():
        return False
    # One "word": code when it has an underscore, a dot or a slash between letters, or camelCase.
    return bool(_CODE.match(english)) and bool(re.search(r"\w[_./\\=:@]\w|[a-z][A-Z]|--", english))
