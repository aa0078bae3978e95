from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.text.languages import LANGUAGES, UnknownLanguageError, resolve_language

DEMO = Path(__file__).resolve().parents[2] / "engine/demo/checkpoint"


@pytest.mark.parametrize(
    ("code", "flores"),
    [
        ("EN", "eng_Latn"),
        ("en-US", "eng_Latn"),
        ("pt-BR", "por_Latn"),
        ("pt_PT", "por_Latn"),
        ("zh", "zho_Hans"),
        ("zh-CN", "zho_Hans"),
        ("ZH-hans", "zho_Hans"),
        ("zh-TW", "zho_Hant"),
        ("zh_Hant_HK", "zho_Hant"),
        ("nb", "nob_Latn"),
        ("no", "nob_Latn"),
        ("nn", "nno_Latn"),
        ("eng", "eng_Latn"),
        ("POR_LATN", "por_Latn"),
        ("es-419", "spa_Latn"),
        ("fa-AF", "prs_Arab"),
        ("fa", "pes_Arab"),
        ("ko-Kore", "kor_Hang"),
        ("sr", "srp_Cyrl"),
        ("de-1996", "deu_Latn"),
        ("iw", "heb_Hebr"),
        ("fil", "tgl_Latn"),
        ("tl", "tgl_Latn"),
        ("ace", "ace_Latn"),
        ("ks-Deva", "kas_Deva"),
        (" de ", "deu_Latn"),
    ],
)
def test_known_codes(code: str, flores: str) -> None:
    assert resolve_language(code).flores == flores


@pytest.mark.parametrize(
    "code", ["", "-", "x", "xx", "english", "sr-Latn", "deu_Cyrl", "en-", "en--US", "ｅｎ", "en/de", "*", "d e"]
)
def test_unknown_codes_are_errors(code: str) -> None:
    with pytest.raises(UnknownLanguageError):
        resolve_language(code)


@given(st.text(max_size=12))
def test_any_text_gives_a_language_or_the_typed_error(code: str) -> None:
    try:
        language = resolve_language(code)
    except UnknownLanguageError:
        return
    assert language in LANGUAGES


def test_table_is_sound() -> None:
    """202 languages; every code, tag and name once; every spelling of a row finds that row."""
    assert len(LANGUAGES) == 202
    for column in ("flores", "bcp47", "name"):
        assert len({getattr(language, column) for language in LANGUAGES}) == 202
    for language in LANGUAGES:
        primary = language.bcp47.partition("-")[0]
        for spelling in (language.flores, language.bcp47, f"{primary}-{language.script}", language.bcp47.upper()):
            assert resolve_language(spelling) is language


def test_codes_are_those_of_the_public_nllb_tokenizer() -> None:
    tokenization = pytest.importorskip("transformers.models.nllb.tokenization_nllb_fast")
    assert {language.flores for language in LANGUAGES} == set(tokenization.FAIRSEQ_LANGUAGE_CODES)


def test_tags_agree_with_cldr() -> None:
    """CLDR's likely subtags of the tag give the FLORES script, except where CLDR's default differs (listed)."""
    likely = pytest.importorskip("babel.core").get_global("likely_subtags")
    other_default = {"crh", "sat", "tzm"}  # Cyrl, Olck and Latn in CLDR
    for language in LANGUAGES:
        primary, _, script = language.bcp47.partition("-")
        expanded = likely.get(primary)
        if script or expanded is None or primary in other_default:
            continue
        assert expanded.split("_")[1].replace("Kore", "Hang") == language.script, language


def test_every_language_of_the_demonstration_model_is_in_the_table() -> None:
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    codes = config["additional_special_tokens"]
    assert len(codes) >= 16
    assert {resolve_language(code).flores for code in codes} == set(codes)
