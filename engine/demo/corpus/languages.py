"""The sixteen languages (FLORES-200 tags) and the names that packages give to them."""

from __future__ import annotations

from typing import Final

ENGLISH: Final = "eng_Latn"

# One row a language: tag -> (CLDR locale, names used in file paths; lower case, "_" between the parts).
_ROWS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "eng_Latn": ("en", ("en", "en_us", "en_en")),
    "deu_Latn": ("de", ("de", "de_de")),
    "fra_Latn": ("fr", ("fr", "fr_fr")),
    "spa_Latn": ("es", ("es", "es_es")),
    "ita_Latn": ("it", ("it", "it_it")),
    "por_Latn": ("pt_BR", ("pt_br",)),
    "nld_Latn": ("nl", ("nl", "nl_nl")),
    "swe_Latn": ("sv", ("sv", "sv_se")),
    "pol_Latn": ("pl", ("pl", "pl_pl")),
    "ces_Latn": ("cs", ("cs", "cs_cz")),
    "rus_Cyrl": ("ru", ("ru", "ru_ru")),
    "ukr_Cyrl": ("uk", ("uk", "uk_ua")),
    "tur_Latn": ("tr", ("tr", "tr_tr")),
    "jpn_Jpan": ("ja", ("ja", "ja_jp")),
    "zho_Hans": ("zh_Hans", ("zh_hans", "zh_cn", "zh_hans_cn", "zh")),
    "kor_Hang": ("ko", ("ko", "ko_kr")),
}

LANGUAGES: Final[tuple[str, ...]] = tuple(_ROWS)
CLDR_LOCALES: Final[dict[str, str]] = {tag: row[0] for tag, row in _ROWS.items()}
_TAG_BY_NAME: Final[dict[str, str]] = {name: tag for tag, row in _ROWS.items() for name in row[1]}


def tag_of_file_name(name: str) -> str | None:
    """FLORES-200 tag for a package's language name ("pt-BR", "zh_Hans"), None when it is not one of ours."""
    return _TAG_BY_NAME.get(name.lower().replace("-", "_"))
