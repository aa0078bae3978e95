"""The README keeps its word: its commands parse, its links lead somewhere, its figures are those of the record."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from app.cli import build_parser
from app.schemas import TranslateBody
from engine.demo.evaluation import table
from loadtest.cli import build_parser as build_loadtest_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]
INLINE = re.findall(r"`((?:babelephant|make|python -m loadtest) [^`]+)`", README)
COMMANDS = sorted({*LINES, *INLINE})


def words_of(command: str) -> list[str]:
    """Without the variables set before it."""
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command)))


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = words_of(command)
    if words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    elif words[0] in ("babelephant", "python"):
        parser, words = (build_parser(), words[1:]) if words[0] == "babelephant" else (build_loadtest_parser(), words[3:])
        # words in capitals stand for what the reader puts there
        words = ["pools.yaml" if word == "POOLS.yaml" else word for word in words]
        if words[-1] == "--help":
            with pytest.raises(SystemExit) as stopped:
                parser.parse_args(words)
            assert stopped.value.code == 0
        else:
            parser.parse_args(words)
    else:
        assert words[0] == "curl"
        TranslateBody.model_validate_json(words[words.index("-d") + 1])


def test_there_are_commands_to_check() -> None:
    assert {"make", "babelephant", "python", "curl"} == {words_of(command)[0] for command in COMMANDS}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_link(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize(("record", "part"), [("quality_english", "with_english"), ("quality_all", "all_directions")])
def test_quality_table_is_the_record(record: str, part: str) -> None:
    figures = json.loads((ROOT / "engine" / "demo" / "record" / f"{record}.json").read_text(encoding="utf-8"))
    assert table(figures[part]) in README
