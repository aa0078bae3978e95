"""What counts as a clean pair."""

from __future__ import annotations

import pytest

from engine.demo.corpus.catalogs import Entry, flatten, parse_javascript, resolve_references
from engine.demo.corpus.cleaning import clean_text, refuse_english, refuse_pair, split_lines
from engine.demo.corpus.groups import Merger
from engine.demo.corpus.marks import is_code, marks_of, same_marks


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t b\u00a0c\u202fd\u3000e ", "a b c d e"),
        ("soft\u00adhyphen\u200b", "softhyphen"),
        ("e\u0301t\u00e9…", "été…"),
        ("名前：", "名前："),
    ],
)
def test_clean_text_normalises_spaces_and_nothing_else(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_lines_are_split_and_blank_ones_go() -> None:
    assert split_lines("one\r\n\n two<br/>three\\nfour") == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("english", "translation", "same"),
    [
        ("Add {name}", "{name} hinzufügen", True),
        ("Add {name}", "{nom} ajouter", False),
        ("%(count)s of %(total)s", "%(total)s / %(count)s", True),
        ("%s files", "Dateien", False),
        ("<b>Bold</b> text", "<b>Fetter</b> Text", True),
        ("<b>Bold</b> text", "Fetter Text", False),
        ("{{n}} left", "noch {n}", False),
        ("Wait 30 seconds", "30 Sekunden warten", True),
        ("Wait 30 seconds", "60 Sekunden warten", False),
        ("See https://a.example/x", "Siehe https://a.example/y", False),
        ("Run `now`", "Jetzt `jetzt`", True),
        ("100% sure", "100 % sicher", True),
    ],
)
def test_marks_must_agree(english: str, translation: str, same: bool) -> None:
    assert same_marks(english, translation) is same


def test_marks_are_counted() -> None:
    assert marks_of("{a} {a} <i>x</i> %d")["{a}"] == 2
    assert sum(marks_of("{a} {a} <i>x</i> %d").values()) == 5


@pytest.mark.parametrize("text", ["https://a.example", "{name}", "snake_case", "a.b.c", "camelCase", "12 + 3"])
def test_code_is_nothing_to_translate(text: str) -> None:
    assert is_code(text)
    assert refuse_english(text) == "code"


@pytest.mark.parametrize("text", ["Settings", "On/off switch", "Add {name}", "Wi-Fi"])
def test_words_are_not_code(text: str) -> None:
    assert refuse_english(text) is None


@pytest.mark.parametrize(
    ("english", "tag", "translation", "reason"),
    [
        ("Settings", "deu_Latn", "Einstellungen", None),
        ("Name", "deu_Latn", "Name", None),
        ("Settings", "rus_Cyrl", "Settings", "untranslated"),
        ("MQTT", "rus_Cyrl", "MQTT", None),
        ("the whole text", "deu_Latn", "the whole text", "untranslated"),
        ("Turn on the light now please", "jpn_Jpan", "Turn on lights soon", "script"),
        ("Turn on the light in the room", "jpn_Jpan", "打开房间里的灯", "script"),
        ("Turn on the light in the room", "zho_Hans", "打开房间里的灯", None),
        ("Lights", "rus_Cyrl", "Світло є", "script"),
        ("Lights", "deu_Latn", "Свет", "script"),
        ("Save the current changes to the file", "deu_Latn", "Ja", "length"),
        ("Save", "deu_Latn", "Speichern " * 30, "length"),
        ("Save", "deu_Latn", "", "empty"),
        ("{n, plural, one {# day} other {# days}}", "deu_Latn", "x", None),
    ],
)
def test_pairs_are_refused_for_a_reason(english: str, tag: str, translation: str, reason: str | None) -> None:
    if english.startswith("{n,"):
        assert refuse_english(english) == "plural syntax"
    else:
        assert refuse_pair(english, tag, translation) == reason


def test_texts_with_language_codes_are_refused() -> None:
    assert refuse_english("The code fra_Latn means French") == "plural syntax"


def test_majority_wins_and_other_line_counts_are_left_out() -> None:
    merger = Merger()
    for german in ("Speichern", "Sichern", "Speichern"):
        merger.add(Entry("a", {"eng_Latn": "Save", "deu_Latn": german}))
    merger.add(Entry("b", {"eng_Latn": "First\nSecond", "deu_Latn": "Erste\nZweite", "fra_Latn": "Première"}))
    texts = {group.texts["eng_Latn"]: group.texts for group in merger.groups()}
    assert texts["Save"] == {"eng_Latn": "Save", "deu_Latn": "Speichern"}
    assert texts["First"] == {"eng_Latn": "First", "deu_Latn": "Erste"}
    assert texts["Second"] == {"eng_Latn": "Second", "deu_Latn": "Zweite"}
    assert merger.refused["lines"] == 2


def test_references_are_resolved_and_dead_ones_removed() -> None:
    flat = flatten({"a": {"x": "[%key:component::b::y%]", "z": "[%key:component::none%]"}, "b": {"y": "Yes"}})
    resolve_references({"eng_Latn": flat})
    assert flat == {"a::x": "Yes", "b::y": "Yes"}


def test_javascript_literals_are_read() -> None:
    code = """// note
    export default { name: 'de', el: { "ok": "O\\u004b", nested: { 'a': 'it\\'s' }, fn(x) { return 1; } } };
    Blockly.Msg["KEY"] = "Wert";"""
    flat = parse_javascript(code)
    assert sorted(flat.values()) == ["OK", "Wert", "de", "it's"]
    assert any(key.endswith("el::nested::a") for key in flat)
