"""Language codes: BCP-47 tags people send, FLORES-200 codes the models know.

Lookup is tolerant of case and of `_` for `-`, and falls back from the right like RFC 4647 lookup: `pt-BR` -> `pt`.
A script that the language does not have here is an error, never ignored: `sr-Latn` is not Serbian in Cyrillic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from app.text.flores import FLORES_LANGUAGES


@dataclass(frozen=True, slots=True)
class Language:
    """One language: FLORES-200 code (`por_Latn`), BCP-47 tag (`pt`), English name (`Portuguese`)."""

    flores: str
    bcp47: str
    name: str

    @property
    def script(self) -> str:
        """ISO 15924 script of the FLORES code."""
        return self.flores.partition("_")[2]


class UnknownLanguageError(ValueError):
    """A code that names none of the languages in the table."""

    def __init__(self, code: str) -> None:
        problem = "is not a language code known here"
        if code.strip().lower() in ("", "auto", "detect", "und"):
            problem = "names no language, and none is detected here"
        super().__init__(
            f"{code!r} {problem}; send a BCP-47 tag such as 'de' or 'zh-Hant', "
            "or a FLORES-200 code such as 'deu_Latn' (GET /v1/languages lists what is served)"
        )
        self.code = code


LANGUAGES: tuple[Language, ...] = tuple(Language(*row) for row in FLORES_LANGUAGES)

# Deprecated or macro-language tags, and regions that decide the written form.
_ALIASES = {
    "iw": "heb_Hebr",
    "in": "ind_Latn",
    "ji": "ydd_Hebr",
    "jw": "jav_Latn",
    "mo": "ron_Latn",
    "no": "nob_Latn",
    "nor": "nob_Latn",
    "fil": "tgl_Latn",
    "ara": "arb_Arab",
    "fas": "pes_Arab",
    "fa-af": "prs_Arab",
    "aze": "azj_Latn",
    "lav": "lvs_Latn",
    "mon": "khk_Cyrl",
    "msa": "zsm_Latn",
    "nep": "npi_Deva",
    "ori": "ory_Orya",
    "orm": "gaz_Latn",
    "pus": "pbt_Arab",
    "que": "quy_Latn",
    "ful": "fuv_Latn",
    "sqi": "als_Latn",
    "swa": "swh_Latn",
    "uzb": "uzn_Latn",
    "yid": "ydd_Hebr",
    "ko-kore": "kor_Hang",
    "zh": "zho_Hans",
    "zho": "zho_Hans",
    "zh-cn": "zho_Hans",
    "zh-sg": "zho_Hans",
    "zh-tw": "zho_Hant",
    "zh-hk": "zho_Hant",
    "zh-mo": "zho_Hant",
    "ace": "ace_Latn",
    "bjn": "bjn_Latn",
    "kas": "kas_Arab",
    "knc": "knc_Latn",
    "taq": "taq_Latn",
}

_TAG = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{1,8})*")
_SCRIPT = re.compile(r"[a-z]{4}")


def _build_index() -> dict[str, Language]:
    """Lower-case hyphenated spelling -> language; aliases never replace a tag of the table."""
    by_flores = {language.flores: language for language in LANGUAGES}
    index: dict[str, Language] = {alias: by_flores[flores] for alias, flores in _ALIASES.items()}
    for language in LANGUAGES:
        primary = language.bcp47.partition("-")[0]
        spellings = {language.flores, language.bcp47, f"{primary}-{language.script}"}
        iso = language.flores.partition("_")[0]
        if sum(other.flores.startswith(f"{iso}_") for other in LANGUAGES) == 1:
            spellings.add(iso)
        index.update({spelling.lower().replace("_", "-"): language for spelling in spellings})
    return index


_INDEX = _build_index()


def resolve_language(code: str) -> Language:
    """Find the language of a BCP-47 tag or FLORES-200 code. Raises UnknownLanguageError."""
    tag = code.strip().replace("_", "-")
    if not _TAG.fullmatch(tag):
        raise UnknownLanguageError(code)
    subtags = tag.lower().split("-")
    while subtags:
        if (language := _INDEX.get("-".join(subtags))) is not None:
            return language
        if len(subtags) > 1 and _SCRIPT.fullmatch(subtags[-1]):
            break  # dropping a script would answer in another one
        subtags.pop()
    raise UnknownLanguageError(code)
