"""The shipped tokenizer: NLLB's format, the same ids everywhere, nothing lost on the way back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from engine.demo.corpus.languages import LANGUAGES

tokenizers = pytest.importorskip("tokenizers")

DEMO = Path(__file__).parents[3] / "engine" / "demo"
ODD = [
    "😀 emoji 🚀👍🏽",
    "rare 龘靐齉 𠮷 characters",
    "full width：！ and … dots",
    "½ ﬁ Ⅷ stay",
    "placeholders {name}, %(count)s, <b>{{x}}</b>",
    "digits 1234567890",
    "ğüşöçİı ąęłż їєґ ёъ",
    "English_Words fra_Latins",
]


@pytest.fixture(scope="module")
def fast() -> Any:
    return tokenizers.Tokenizer.from_file(str(DEMO / "checkpoint" / "tokenizer.json"))


@pytest.fixture(scope="module")
def sample() -> list[str]:
    with gzip.open(DEMO / "heldout.jsonl.gz", "rt", encoding="utf-8") as handle:
        records = [json.loads(line) for line in handle]
    return [text for record in records[::9] for text in record["texts"].values()]


def test_round_trip(fast: Any, sample: list[str]) -> None:
    for text in [*sample, *ODD]:
        assert fast.decode(fast.encode(text, add_special_tokens=False).ids) == text


def test_spaces_collapse(fast: Any) -> None:
    for text in ("a\tb", "a  b", "a\u00a0b", "a\u202fb", "a\u3000b"):
        assert fast.decode(fast.encode(text, add_special_tokens=False).ids) == "a b", repr(text)


def test_digits_are_single_pieces(fast: Any) -> None:
    pieces = fast.encode("2024 and 1,234", add_special_tokens=False).tokens
    assert all(len(piece.strip("▁")) <= 1 for piece in pieces if any(sign.isdigit() for sign in piece))


def test_ids_follow_nllb(fast: Any) -> None:
    assert [fast.token_to_id(piece) for piece in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    vocabulary = fast.get_vocab(with_added_tokens=True)
    assert max(vocabulary.values()) + 1 <= 12_032
    assert len(set(vocabulary.values())) == len(vocabulary)
    for tag in LANGUAGES:
        assert fast.token_to_id(tag) is not None
    assert not fast.encode("龘 😀", add_special_tokens=False).ids.count(3)


def test_language_codes_as_words_are_special_tokens(fast: Any) -> None:
    ids = fast.encode("word deu_Latn word", add_special_tokens=False).ids
    assert fast.token_to_id("deu_Latn") in ids


def test_transformers_gives_the_same_ids(fast: Any, sample: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(DEMO / "checkpoint"))
    for text in [*sample[:800], *ODD, "a\tb", "deu_Latn in text"]:
        assert reference(text, add_special_tokens=False).input_ids == fast.encode(text, add_special_tokens=False).ids
    reference.src_lang = "kor_Hang"
    ids = reference("Hello").input_ids
    assert ids[0] == fast.token_to_id("kor_Hang")
    assert ids[-1] == fast.token_to_id("</s>")
    assert reference.decode(reference("Nom : {x} !").input_ids, skip_special_tokens=True) == "Nom : {x} !"


def test_sentencepiece_gives_the_same_ids(fast: Any, sample: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = DEMO / "checkpoint" / "sentencepiece.bpe.model"
    if not model.exists():
        pytest.skip("the model was too large to ship")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*sample[:800], *ODD]:
        assert [number + 1 for number in pieces.encode(text)] == fast.encode(text, add_special_tokens=False).ids, text
