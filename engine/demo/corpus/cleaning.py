"""Turns raw catalogue texts into clean sentence pairs, or refuses them with a reason."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Final, Literal

from engine.demo.corpus.marks import is_code, same_marks, without_marks

MAX_CHARACTERS: Final = 400
Refusal = Literal["empty", "long", "code", "marks", "script", "length", "untranslated", "plural syntax"]

# All kinds of spaces become the plain space: French and CLDR numbers use narrow no-break spaces, translators mix them.
_SPACES: Final = re.compile(r"[\s\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_INVISIBLE: Final = re.compile(
    r"[\u0000-\u0008\u000e-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]"
)
_ICU: Final = re.compile(r"\{\s*\w+\s*,\s*(?:plural|select|selectordinal|number|date|time)\b")
_LANGUAGE_CODE: Final = re.compile(r"\b[a-z]{3}_[A-Z][a-z]{3}\b")
_LOWER_WORD: Final = re.compile(r"(?<![^\W_])[a-z]{2,}(?![^\W_])")
_CYRILLIC: Final = re.compile(r"[\u0400-\u04ff]")
_KANA: Final = re.compile(r"[\u3040-\u30ff]")
_HAN: Final = re.compile(r"[\u3400-\u9fff]")
_HANGUL: Final = re.compile(r"[\uac00-\ud7a3]")
_EAST_ASIAN: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_LETTER: Final = re.compile(r"[^\W\d_]")

NATIVE: Final[dict[str, re.Pattern[str]]] = {
    "rus_Cyrl": _CYRILLIC,
    "ukr_Cyrl": _CYRILLIC,
    "jpn_Jpan": _EAST_ASIAN,
    "zho_Hans": _HAN,
    "kor_Hang": _HANGUL,
}
# Letters that tell a text of a neighbouring language by mistake.
_FOREIGN: Final[dict[str, re.Pattern[str]]] = {
    "rus_Cyrl": re.compile(r"[іїєґІЇЄҐ]"),
    "ukr_Cyrl": re.compile(r"[ыэъёЫЭЪЁ]"),
    "zho_Hans": re.compile(r"[\u3040-\u30ff\uac00-\ud7a3]"),
    "jpn_Jpan": _HANGUL,
}
_LATIN_FOREIGN: Final = re.compile(r"[\u0400-\u04ff\u0600-\u06ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")


def clean_text(text: str) -> str:
    """One line, plain single spaces, no invisible characters, composed accents; everything else stays as it is."""
    text = unicodedata.normalize("NFC", text.replace("\\n", "\n"))
    return _SPACES.sub(" ", _INVISIBLE.sub("", text)).strip()


def split_lines(text: str) -> list[str]:
    """The clean non-empty lines of a raw text."""
    lines = re.split(r"[\r\n]+|\\n|<br\s*/?>", text)
    return [line for line in map(clean_text, lines) if line]


def refuse_english(english: str) -> Refusal | None:
    """Why a clean English text is of no use, None when it is fine."""
    if not english:
        return "empty"
    if len(english) > MAX_CHARACTERS:
        return "long"
    if _ICU.search(english) or _LANGUAGE_CODE.search(english):
        return "plural syntax"
    if is_code(english):
        return "code"
    return None if not _LATIN_FOREIGN.search(english) else "script"


def refuse_pair(english: str, tag: str, translation: str) -> Refusal | None:
    """Why a clean translation does not go with a clean English text, None when it does."""
    checks: tuple[tuple[Refusal, Callable[[], bool]], ...] = (
        ("empty", lambda: not translation),
        ("long", lambda: len(translation) > MAX_CHARACTERS),
        ("plural syntax", lambda: bool(_ICU.search(translation) or _LANGUAGE_CODE.search(translation))),
        ("marks", lambda: not same_marks(english, translation)),
        ("untranslated", lambda: _is_untranslated(english, tag, translation)),
        ("script", lambda: not _script_fits(english, tag, translation)),
        ("length", lambda: not _length_fits(english, tag, translation)),
    )
    return next((reason for reason, applies in checks if applies()), None)


def _is_untranslated(english: str, tag: str, translation: str) -> bool:
    """Equal texts stay only when they look like names: no word in lower case, and short."""
    if english.casefold() != translation.casefold():
        return False
    words = without_marks(english)
    if _LOWER_WORD.search(words):
        return True
    if tag in NATIVE:  # "Settings" left in English in a Russian text; an acronym may stay
        return bool(re.search(r"[a-z]", words))
    return len(words.split()) > 3


def _script_fits(english: str, tag: str, translation: str) -> bool:
    bare, bare_english = without_marks(translation), without_marks(english)
    native = NATIVE.get(tag)
    if native is None:
        return not _LATIN_FOREIGN.search(bare)
    if tag in _FOREIGN and _FOREIGN[tag].search(bare):
        return False
    letters = len(_LETTER.findall(bare))
    share = len(native.findall(bare)) / max(letters, 1)
    num_lower = len(_LOWER_WORD.findall(bare_english))
    if tag == "jpn_Jpan" and num_lower >= 5 and not _KANA.search(bare):
        return False  # Chinese by mistake
    if num_lower >= 3:
        return share >= 0.25
    return num_lower == 0 or share > 0


def _length_fits(english: str, tag: str, translation: str) -> bool:
    """Characters outside marks: the ratio must be ordinary, with slack for short texts."""
    source, target = len(without_marks(english).strip()), len(without_marks(translation).strip())
    if tag in ("zho_Hans", "jpn_Jpan", "kor_Hang"):
        low, high = 0.12, 1.4
    else:
        low, high = 0.45, 2.2
    slack = 10
    return source * low - slack <= target <= source * high + slack
