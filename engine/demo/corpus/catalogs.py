"""Reads message catalogues (nested JSON, gettext, JavaScript object literals) into keyed texts."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.demo.corpus.archives import members
from engine.demo.corpus.languages import ENGLISH, tag_of_file_name
from engine.demo.corpus.sources import Source


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of one package: its text in English and in other languages (FLORES-200 tag -> raw text)."""

    source: str
    texts: dict[str, str]


Flat = dict[str, str]  # key path joined with "::" -> text
_REFERENCE = re.compile(r"^\[%key:(.+)%\]$")
_JS_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/"
    r"|(?P<key>[A-Za-z_$][\w$]*|'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|\d+)\s*:(?!:)"
    r"|\[\"(?P<index>\w+)\"\]\s*=(?!=)"
    r"|(?P<text>'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|`(?:[^`\\]|\\.)*`)"
    r"|(?P<brace>[{}])",
    re.DOTALL,
)
_JS_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|\n|.)", re.DOTALL)
_JS_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "\n": ""}


def unquote_javascript(literal: str) -> str:
    """The text of a quoted JavaScript literal."""

    def replace(match: re.Match[str]) -> str:
        escape = match[1]
        if len(escape) > 1:
            return chr(int(escape[1:], 16))
        return _JS_CONTROL.get(escape, escape)

    return _JS_ESCAPE.sub(replace, literal[1:-1])


def flatten(tree: object, prefix: str = "") -> Flat:
    """Nested dictionaries of texts -> one dictionary by key path; what is not a text is left out."""
    if isinstance(tree, str):
        return {prefix: tree}
    flat: Flat = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            flat.update(flatten(value, f"{prefix}::{key}" if prefix else str(key)))
    return flat


def parse_javascript(code: str) -> Flat:
    """Texts of the object literals in `code` by key path."""
    flat: Flat = {}
    path: list[str] = []
    key = ""
    for token in _JS_TOKEN.finditer(code):
        if token["key"] or token["index"]:
            key = token["index"] or token["key"].strip("'\"")
        elif token["text"]:
            if key:
                flat.setdefault("::".join([*path, key]), unquote_javascript(token["text"]))
            key = ""
        elif token["brace"] == "{":
            path.append(key)
            key = ""
        elif token["brace"] == "}" and path:
            path.pop()
    return flat


def resolve_references(by_lang: dict[str, Flat]) -> None:
    """Replaces `[%key:other::key%]` by the text it names, in place; a text that names nothing is removed."""
    for flat in by_lang.values():
        for key in list(flat):
            text = flat[key]
            for _ in range(4):
                reference = _REFERENCE.match(text)
                if reference is None:
                    break
                text = flat.get(reference[1].removeprefix("component::"), "")
            if text and "[%key:" not in text:
                flat[key] = text
            else:
                del flat[key]


def read_keyed(source: Source, archive: Path) -> Iterator[Entry]:
    """Entries of a package whose languages share their keys (JSON or JavaScript)."""
    by_lang: dict[str, Flat] = defaultdict(dict)
    for match, content in members(archive, re.compile(source.pattern)):
        tag = tag_of_file_name(match["lang"])
        if tag is None:
            continue
        code = content.decode("utf-8")
        flat = flatten(json.loads(code)) if source.catalog_format == "json" else parse_javascript(code)
        # JavaScript files name their outermost object after the language, and JSON may nest under the language's code.
        top = f"{match['lang']}::"
        for key, text in flat.items():
            path = key.removeprefix(top) if source.catalog_format == "json" else key.split("::", 1)[-1]
            by_lang[tag].setdefault(f"{match['bundle']}::{path}", text)
    resolve_references(by_lang)
    for key, english in by_lang[ENGLISH].items():
        others = {tag: flat[key] for tag, flat in by_lang.items() if tag != ENGLISH and key in flat}
        if others:
            yield Entry(source.name, {ENGLISH: english, **others})


def read_gettext(source: Source, archive: Path) -> Iterator[Entry]:
    """Entries of a package with gettext catalogues: the msgid is the English text.

    Of a plural message, the singular goes with the first form and the plural with the last one: the first form
    serves n = 1 in all our languages that have more than one, and the last is the one for large numbers.
    """
    try:
        import polib
    except ImportError as error:
        raise RuntimeError("polib reads the gettext catalogues: pip install 'babelephant[demo]'") from error
    for match, content in members(archive, re.compile(source.pattern)):
        tag = tag_of_file_name(match["lang"])
        if tag is None or tag == ENGLISH:
            continue
        compiled = match[0].endswith(".mo")
        for item in polib.mofile(content) if compiled else polib.pofile(content.decode("utf-8")):
            if item.obsolete or getattr(item, "fuzzy", False):  # compiled entries are never fuzzy
                continue
            if not item.msgid_plural:
                if item.msgstr:
                    yield Entry(source.name, {ENGLISH: item.msgid, tag: item.msgstr})
            elif item.msgstr_plural and all(item.msgstr_plural.values()):
                forms = [item.msgstr_plural[form] for form in sorted(item.msgstr_plural)]
                yield Entry(source.name, {ENGLISH: item.msgid_plural, tag: forms[-1]})
                yield Entry(source.name, {ENGLISH: item.msgid, tag: forms[0]})
