"""engine.tokenizer against transformers' AutoTokenizer, and with the text nobody should send."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import engine.demo
from engine.tokenizer import Tokenizer, TokenizerError
from engine.types import RequestError
from tests.engine.tiny_tokenizer import TINY_LANGUAGES, write_tiny_tokenizer

DEMO = Path(engine.demo.__file__).parent / "checkpoint"
ORDINARY = [
    "Hello, world!",
    "  The   price is\n3.50 €\t(incl. VAT). ",
    "Où est la bibliothèque ? « Là-bas »",
    "Größe: ½ Maß, ﬁne ①",
    "Съешь же ещё этих мягких французских булок",
    "日本語のテストです。",
    "한국어 문장",
    "İstanbul'da ğüşıöç",
    "emoji 🎉🧿 and \u200b zero width",
    "{name} has %d items <b>bold</b> &amp; https://example.org/?q=1",
    "a" * 300,
]
CONTROL_WORDS = ["</s>", "<s>", "<pad>", "<unk>", "<mask>", "fra_Latn", "eng_Latn", "jpn_Jpan"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(DEMO)


@pytest.fixture(scope="module")
def oracle():
    return AutoTokenizer.from_pretrained(DEMO)


def _oracle_ids(oracle, text: str, src_lang: str) -> list[int]:
    oracle.src_lang = src_lang
    return oracle(text).input_ids


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("src_lang", ["eng_Latn", "zho_Hans"])
def test_ids_and_text_equal_transformers(tokenizer: Tokenizer, oracle, text: str, src_lang: str) -> None:
    ids = tokenizer.encode(text, src_lang)
    assert ids.dtype == np.int32
    assert ids.tolist() == _oracle_ids(oracle, text, src_lang)
    assert tokenizer.decode(ids) == oracle.decode(ids.tolist(), skip_special_tokens=True).strip()


@given(text=st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=40))
def test_ids_equal_transformers_on_any_visible_text(tokenizer: Tokenizer, oracle, text: str) -> None:
    if text.strip(" "):
        assert tokenizer.encode(text, "pol_Latn").tolist() == _oracle_ids(oracle, text, "pol_Latn")


@pytest.mark.parametrize("word", CONTROL_WORDS)
@pytest.mark.parametrize("frame", ["{}", "a {} b", "x{}y", "{0}{0}"])
def test_control_words_of_a_user_are_plain_text(tokenizer: Tokenizer, word: str, frame: str) -> None:
    text = frame.format(word)
    ids = tokenizer.encode(text, "deu_Latn")
    control_ids = {tokenizer.language_id(code) for code in tokenizer.languages} | {0, 1, 2, 3}
    assert ids[0] == tokenizer.language_id("deu_Latn")
    assert ids[-1] == 2
    assert not control_ids & set(ids[1:-1].tolist())
    assert tokenizer.decode(ids) == text


def test_every_language_has_its_tag_first(tokenizer: Tokenizer, oracle) -> None:
    assert len(tokenizer.languages) == 16
    for code in tokenizer.languages:
        assert tokenizer.language_id(code) == oracle.convert_tokens_to_ids(code) == tokenizer.encode("x", code)[0]


def test_ids_without_a_token_are_not_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Good morning", "eng_Latn").tolist()
    assert tokenizer.decode([2, *ids, tokenizer.num_ids, 10**6, -1, 1, 1]) == "Good morning"


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000\u00a0"])
def test_white_space_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode(text, "eng_Latn")
    assert caught.value.code == "empty_text"


@pytest.mark.parametrize(
    ("code", "hint"), [("fra", "fra_Latn"), ("FRA_LATN", "fra_Latn"), ("xx", "choose one of"), ("", "eng_Latn")]
)
def test_an_unknown_language_is_refused_with_a_hint(tokenizer: Tokenizer, code: str, hint: str) -> None:
    with pytest.raises(RequestError, match=hint) as caught:
        tokenizer.encode("hello", code)
    assert caught.value.code == "unsupported_language"


def test_special_tokens_are_not_languages(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError):
        tokenizer.language_id("</s>")


def test_tiny_tokenizer_equals_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(write_tiny_tokenizer(tmp_path))
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.languages == TINY_LANGUAGES
    for text in ("the inn on a hill", "qzx", "Ünknown ? the"):
        assert tokenizer.encode(text, "fra_Latn").tolist() == _oracle_ids(oracle, text, "fra_Latn")


def test_files_are_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json does not exist"):
        Tokenizer.from_checkpoint(tmp_path)
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "[]", "JSON object"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", '{"legacy_behaviour": true}', "set it to false"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "has no '<end>'"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_checkpoint(tmp_path)


def test_a_tokenizer_without_languages_is_refused(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"] = [token for token in raw["added_tokens"] if "_" not in token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(TokenizerError, match="no language code"):
        Tokenizer.from_checkpoint(tmp_path)
