"""Demand of language pairs, and the YAML that `babelephant demand` writes and `babelephant plan --layout` reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from app.cost.lengths import PairLengths

DEFAULT_CORRELATION = 0.2  # assumed where no log says how pairs rise and fall together


class TrafficError(ValueError):
    """A log or a file of pairs that cannot be used; the message names the place and the fix."""


@dataclass(frozen=True, slots=True)
class PairDemand:
    """What one pair asks for: sentences per second, the quantile to plan for and the mean; characters and tokens of a
    sentence. Tokens are None where only characters are known.
    """

    pair: str
    peak_per_s: float
    mean_per_s: float
    source_chars: float
    source_tokens: float | None = None
    target_tokens: float | None = None

    def __post_init__(self) -> None:
        for name in ("peak_per_s", "mean_per_s", "source_chars", "source_tokens", "target_tokens"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise TrafficError(f"pair {self.pair}: {name} is {value!r}; it must be a positive number")
        if self.mean_per_s > self.peak_per_s:
            raise TrafficError(f"pair {self.pair}: mean_per_s {self.mean_per_s} is above peak_per_s {self.peak_per_s}")

    def with_tokens(self, lengths: PairLengths) -> PairDemand:
        """Tokens that are not known, as learnt for this pair. Raises LengthsError while nothing was learnt."""
        if self.source_tokens is not None and self.target_tokens is not None:
            return self
        length = lengths.estimate(self.pair)
        source = length.fertility * self.source_chars if self.source_tokens is None else self.source_tokens
        target = source * length.length_ratio if self.target_tokens is None else self.target_tokens
        return replace(self, source_tokens=source, target_tokens=target)


@dataclass(frozen=True, slots=True)
class Traffic:
    """All pairs; correlation of their rates about their means, which says how much a shared pool evens out."""

    pairs: tuple[PairDemand, ...]
    correlation: float

    def __post_init__(self) -> None:
        if not self.pairs:
            raise TrafficError("there are no pairs")
        if len({demand.pair for demand in self.pairs}) < len(self.pairs):
            raise TrafficError("a pair is there twice; write each one once")
        if not 0 <= self.correlation <= 1:
            raise TrafficError(f"correlation is {self.correlation}; it must be between 0 and 1")

    @classmethod
    def read(cls, path: Path) -> Traffic:
        """From YAML as `save` writes it. Raises TrafficError, OSError."""
        raw: Any = yaml.safe_load(path.read_text())
        if not isinstance(raw, dict) or set(raw) - {"correlation", "pairs"} or not isinstance(raw.get("pairs"), list):
            raise TrafficError(f"{path}: must be `pairs:`, a list, and may say `correlation:`")
        pairs = []
        for index, entry in enumerate(raw["pairs"], 1):
            try:
                pairs.append(PairDemand(**entry))
            except TypeError as error:
                raise TrafficError(
                    f"{path}: pair {index}: {error}; fields are pair, peak_per_s, mean_per_s, source_chars, source_tokens, "
                    "target_tokens"
                ) from error
        return cls(tuple(pairs), float(raw.get("correlation", DEFAULT_CORRELATION)))

    def with_tokens(self, lengths: PairLengths) -> Traffic:
        """All tokens known, see PairDemand. Raises LengthsError while nothing was learnt and a pair lacks them."""
        return replace(self, pairs=tuple(demand.with_tokens(lengths) for demand in self.pairs))

    def save(self, path: Path) -> None:
        """Write as YAML, a pair a line."""
        path.write_text(f"correlation: {self.correlation:.3f}\npairs:\n" + "".join(map(_line, self.pairs)))


def _line(demand: PairDemand) -> str:
    numbers = {name: getattr(demand, name) for name in PairDemand.__slots__[1:]}
    known = ", ".join(f"{name}: {value:.6g}" for name, value in numbers.items() if value is not None)
    return f"- {{pair: {demand.pair}, {known}}}\n"
