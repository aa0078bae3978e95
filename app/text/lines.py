"""Texts to sentences and back: one sentence per line, so that line structure survives the model.

The tokenizer folds newlines, tabs and double spaces into one space. Each line is therefore translated on its own; blank
lines and the white space around a line (indentation, a carriage return) never reach the model and are put back unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One line: leading white space, the sentence ("" for a blank line), trailing white space."""

    before: str
    sentence: str
    after: str


def split_lines(text: str) -> tuple[Line, ...]:
    r"""Split on "\n" only. `join_lines(lines, [line.sentence ...])` gives the text back exactly."""
    return tuple(_parse_line(line) for line in text.split("\n"))


def join_lines(lines: Sequence[Line], sentences: Sequence[str]) -> str:
    """Put translated sentences, one for each line that has a sentence, back into the line structure."""
    translated = iter(sentences)
    return "\n".join(line.before + (next(translated) if line.sentence else "") + line.after for line in lines)


def _parse_line(line: str) -> Line:
    sentence = line.strip()
    if not sentence:
        return Line(before=line, sentence="", after="")
    start = line.index(sentence)
    return Line(before=line[:start], sentence=sentence, after=line[start + len(sentence) :])
