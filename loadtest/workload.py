"""What is sent: pairs, lengths and texts of a workload file, and the requests of a run drawn from it with a seed.

Files lie in `loadtest/workloads/` as data; sentences are in a file of their own, by language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loadtest.errors import LoadTestError
from loadtest.slo import ServiceLevel

WORKLOADS = Path(__file__).parent / "workloads"
_PROBES = 8  # sentences looked at to find one near the length that is wanted
_NUMBER = re.compile(r"\{n\}")

Positive = Annotated[float, Field(gt=0)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lengths(_Data):
    """Characters of a text: lognormal with this median, clipped."""

    median: Positive
    sigma: Annotated[float, Field(ge=0, le=3)]
    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]


class PairMix(_Data):
    """One language pair, how often it comes, and its own lengths if they differ."""

    source_lang: Annotated[str, Field(min_length=2)]
    target_lang: Annotated[str, Field(min_length=2)]
    weight: Positive
    characters: Lengths | None = None

    @property
    def name(self) -> str:
        """`eng_Latn-deu_Latn`."""
        return f"{self.source_lang}-{self.target_lang}"


class Workload(_Data):
    """A workload file."""

    name: str
    description: str
    texts: str
    slo: ServiceLevel
    texts_per_request: dict[Annotated[int, Field(ge=1)], Positive] = Field(min_length=1)
    characters: Lengths
    join: str = " "
    beam_size: Annotated[int, Field(ge=1, le=8)] | None = None
    pairs: list[PairMix] = Field(min_length=1)

    @field_validator("pairs")
    @classmethod
    def _no_pair_twice(cls, pairs: list[PairMix]) -> list[PairMix]:
        names = [pair.name for pair in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return pairs


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, ready to send. body: JSON in UTF-8; source_chars: characters of all its texts."""

    pair_index: int
    body: bytes
    num_texts: int
    source_chars: int


@dataclass(frozen=True, slots=True)
class LoadedWorkload:
    """A workload and its sentences by source language."""

    workload: Workload
    sentences: Mapping[str, tuple[str, ...]]

    def draw(self, count: int, seed: int) -> list[PlannedRequest]:
        """`count` requests, a pure function of the files and the seed."""
        rng = np.random.default_rng([seed, 1])  # apart from the arrivals' stream: another rate keeps the texts
        weights = np.array([pair.weight for pair in self.workload.pairs])
        sizes = list(self.workload.texts_per_request)
        size_weights = np.array(list(self.workload.texts_per_request.values()))
        pair_indices = rng.choice(len(weights), size=count, p=weights / weights.sum())
        nums_texts = rng.choice(sizes, size=count, p=size_weights / size_weights.sum())
        return [self._request(int(pair), int(num), rng) for pair, num in zip(pair_indices, nums_texts, strict=True)]

    def _request(self, pair_index: int, num_texts: int, rng: np.random.Generator) -> PlannedRequest:
        pair = self.workload.pairs[pair_index]
        lengths = pair.characters or self.workload.characters
        texts = [self._text(self.sentences[pair.source_lang], lengths, rng) for _ in range(num_texts)]
        body: dict[str, Any] = {"source_lang": pair.source_lang, "target_lang": pair.target_lang, "texts": texts}
        if self.workload.beam_size is not None:
            body["beam_size"] = self.workload.beam_size
        encoded = json.dumps(body, ensure_ascii=False).encode()
        return PlannedRequest(pair_index, encoded, num_texts, sum(map(len, texts)))

    def _text(self, sentences: Sequence[str], lengths: Lengths, rng: np.random.Generator) -> str:
        """Whole sentences whose joined length comes near a drawn one; the numbers in them are drawn too, so texts differ."""
        wanted = float(np.clip(lengths.median * np.exp(lengths.sigma * rng.standard_normal()), lengths.min, lengths.max))
        lengths_known = sorted(map(len, sentences))
        parts: list[str] = []
        left = wanted
        while not parts or left > lengths_known[0]:
            num_probes = _PROBES if left < lengths_known[-1] else 1
            sentence = _nearest(sentences, left, num_probes, rng)
            parts.append(_NUMBER.sub(lambda _: str(rng.integers(2, 10_000)), sentence))
            left -= len(parts[-1]) + len(self.workload.join)
        return self.workload.join.join(parts)


def _nearest(sentences: Sequence[str], length: float, num_probes: int, rng: np.random.Generator) -> str:
    probes: list[str] = [sentences[index] for index in rng.integers(len(sentences), size=num_probes).tolist()]
    return min(probes, key=lambda sentence: abs(len(sentence) - length))


def load_workload(name_or_path: str) -> LoadedWorkload:
    """Read a workload (a shipped name or a path) and its sentences; LoadTestError names file, field and fix."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = WORKLOADS / f"{name_or_path}.yaml"
    if not path.is_file():
        raise LoadTestError(f"no workload {name_or_path!r}; shipped: {', '.join(shipped_workloads())}; or give a .yaml file")
    try:
        workload = Workload.model_validate(_read_yaml(path))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:4])
        raise LoadTestError(f"{path}: {problems}") from error
    _check_lengths(path, workload)
    return LoadedWorkload(workload, _load_sentences(path, workload))


def shipped_workloads() -> list[str]:
    """Names of the workloads that come with the project."""
    return sorted(path.stem for path in WORKLOADS.glob("*.yaml") if path.stem != "sentences")


def _check_lengths(path: Path, workload: Workload) -> None:
    for lengths in [workload.characters, *(pair.characters for pair in workload.pairs if pair.characters)]:
        if lengths.min > lengths.max:
            raise LoadTestError(f"{path}: characters: min {lengths.min} is above max {lengths.max}")


def _load_sentences(path: Path, workload: Workload) -> dict[str, tuple[str, ...]]:
    source = path.parent / workload.texts
    if not source.is_file():
        raise LoadTestError(f"{path}: texts: no file {source}")
    data = _read_yaml(source)
    if not isinstance(data, dict):
        raise LoadTestError(f"{source}: expected a mapping of language code to a list of sentences")
    sentences: dict[str, tuple[str, ...]] = {}
    for code in dict.fromkeys(pair.source_lang for pair in workload.pairs):
        known = data.get(code)
        if not isinstance(known, list) or not known:
            raise LoadTestError(f"{source}: no sentences for source language {code}; it has {', '.join(map(str, data))}")
        bad = [text for text in known if not isinstance(text, str) or not text.strip()]
        if bad:
            raise LoadTestError(
                f"{source}: {code}: {bad[0]!r} is not a sentence; quote it if YAML reads it as something else"
            )
        sentences[code] = tuple(known)
    return sentences


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LoadTestError(f"{path}: {error}") from error
