"""How long a text becomes: tokens per character and target per source token, learnt pair by pair.

    source tokens = characters * fertility(pair)
    target tokens = source tokens * length ratio(pair)

A pair seen three times hardly moves away from the other pairs of its source language, one seen ten thousand times speaks
for itself (app.cost.credibility). What is kept of a pair are five sums a ratio, so memory does not grow with traffic; with
a half-life old traffic fades, and a pair that fades loses its weight.

Sums over batches of volume w (characters or source tokens) and outcome y (source or target tokens), each times its fading
f: f w, f y, f y^2 / w, f, f^2 w. With them the noise s2 is unbiased whatever the fading: the expectation of
sum f w (y/w - mean)^2 is s2 (sum f - sum f^2 w / sum f w), and the mean has the variance s2 sum f^2 w / (sum f w)^2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.cost.credibility import Credibility, shrink

VERSION = 1
_FADE_STEP = 1 / 64  # of a half-life: time passes for the sums in steps no finer than this
_VOLUME, _OUTCOME, _SQUARES, _COUNT, _VOLUME2 = range(5)
# Believed before anything was seen, worth one degree of freedom: sentences of 100 characters (25 tokens) scatter by 30 %.
_PRIOR_SCATTER = 0.3
_SENTENCE = {"fertility": 100.0, "length_ratio": 25.0}
_EXACT = 1e-6  # no mean is known better than to this share
RATIOS = ("fertility", "length_ratio")


class LengthsError(ValueError):
    """Lengths that cannot be read or are not known; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PairTraffic:
    """What one pair translated in a while: characters of the sources, tokens of sources and of targets."""

    source_chars: float
    source_tokens: float
    target_tokens: float

    def __post_init__(self) -> None:
        values = (self.source_chars, self.source_tokens, self.target_tokens)
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise LengthsError(f"characters and tokens must be numbers of at least 0, not {values}")


@dataclass(frozen=True, slots=True)
class PairLength:
    """fertility source tokens per character, length_ratio target tokens per source token; trust in the pair's own mean of
    each, 0 to 1; characters seen, faded.
    """

    fertility: float
    length_ratio: float
    fertility_trust: float = 0.0
    length_ratio_trust: float = 0.0
    seen_chars: float = 0.0

    def tokens(self, source_chars: float) -> tuple[float, float]:
        """Source and target tokens of a text of so many characters."""
        source = source_chars * self.fertility
        return source, source * self.length_ratio


class PairLengths:
    """Learns from traffic. half_life_s: seconds after which traffic counts half, None for ever; max_pairs kept, the least
    seen goes first. Pairs are named `source-target`, each side a language code without a hyphen.
    """

    def __init__(self, half_life_s: float | None = None, max_pairs: int = 4096) -> None:
        if (half_life_s is not None and not half_life_s > 0) or max_pairs < 1:
            raise LengthsError("half_life_s must be positive, or None to forget nothing, and max_pairs at least 1")
        self.half_life_s = half_life_s
        self.max_pairs = max_pairs
        self._time_s: float | None = None
        self._rows: dict[str, int] = {}
        self._sums = {ratio: np.zeros((0, 5)) for ratio in RATIOS}
        self._estimates: dict[str, Credibility] | None = None

    @property
    def pairs(self) -> tuple[str, ...]:
        """Pairs seen and kept, in the order of the rows of all sums."""
        return tuple(self._rows)

    def observe(self, time_s: float, traffic: Mapping[str, PairTraffic]) -> None:
        """One batch a pair, the newest last; time_s on any clock that goes forward."""
        self._fade(time_s)
        for pair, seen in traffic.items():
            if seen.source_chars <= 0 or seen.source_tokens <= 0:
                continue
            row = self._row(pair)
            for ratio, volume, outcome in (
                ("fertility", seen.source_chars, seen.source_tokens),
                ("length_ratio", seen.source_tokens, seen.target_tokens),
            ):
                self._sums[ratio][row] += (volume, outcome, outcome * outcome / volume, 1.0, volume)
        self._estimates = None
        self._drop()

    def estimate(self, pair: str) -> PairLength:
        """What to expect of a pair, seen or not: a pair not seen is like its language, a language not seen like all.

        Raises LengthsError while nothing was seen.
        """
        (fertility, trust), (length_ratio, ratio_trust) = (self._estimate(ratio, pair) for ratio in RATIOS)
        seen = float(self._sums["fertility"][self._rows[pair], _VOLUME]) if pair in self._rows else 0.0
        return PairLength(fertility, length_ratio, trust, ratio_trust, seen)

    def raw(self, pair: str) -> tuple[float, float]:
        """Fertility and length ratio of what was seen of this pair alone. Raises KeyError for a pair not seen."""
        row = self._rows[pair]
        fertility, ratio = (float(self._sums[r][row, _OUTCOME] / self._sums[r][row, _VOLUME]) for r in RATIOS)
        return fertility, ratio

    def save(self, path: Path) -> None:
        """Write as JSON, at once or not at all."""
        state = {
            "babelephant_lengths": VERSION,
            "half_life_s": self.half_life_s,
            "max_pairs": self.max_pairs,
            "time_s": self._time_s,
            "pairs": {pair: {r: self._sums[r][row].tolist() for r in RATIOS} for pair, row in self._rows.items()},
        }
        written = path.with_name(path.name + ".new")
        written.write_text(json.dumps(state) + "\n")
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> PairLengths:
        """Read what `save` wrote. Raises LengthsError, OSError."""
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            if state["babelephant_lengths"] != VERSION:
                raise LengthsError(f"{path} has version {state['babelephant_lengths']}; this program reads {VERSION}")
            lengths = cls(state["half_life_s"], state["max_pairs"])
            lengths._time_s = state["time_s"]
            lengths._rows = {pair: row for row, pair in enumerate(state["pairs"])}
            for ratio in RATIOS:
                sums = np.array([sums[ratio] for sums in state["pairs"].values()], np.float64).reshape(-1, 5)
                if len(sums) != len(lengths._rows) or not (np.isfinite(sums).all() and (sums >= 0).all()):
                    raise ValueError(f"sums of {ratio}")
                lengths._sums[ratio] = sums
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, LengthsError):
                raise
            raise LengthsError(
                f"{path} holds no learnt lengths ({error}); write it with: babelephant demand LOG.csv --lengths {path}"
            ) from error
        return lengths

    def _estimate(self, ratio: str, pair: str) -> tuple[float, float]:
        """One ratio of a pair, and the trust in the pair's own mean."""
        if not self._rows:
            raise LengthsError("no translation was seen yet, so tokens per character are not known")
        if self._estimates is None:
            self._estimates = {each: self._shrunk(each) for each in RATIOS}
        found, row = self._estimates[ratio], self._rows.get(pair)
        if row is not None:
            return float(found.pair[row]), float(found.weight[row])
        language = self._languages().get(_source(pair))
        return (found.overall if language is None else float(found.language[language])), 0.0

    def _shrunk(self, ratio: str) -> Credibility:
        sums = self._sums[ratio]
        volume, outcome = sums[:, _VOLUME], sums[:, _OUTCOME]
        mean = outcome / volume
        within = float((sums[:, _SQUARES] - outcome * mean).sum())
        freedom = float((sums[:, _COUNT] - sums[:, _VOLUME2] / volume).sum())
        believed = (_PRIOR_SCATTER * outcome.sum() / volume.sum()) ** 2 * _SENTENCE[ratio]
        s2 = (believed + max(within, 0.0)) / (1.0 + max(freedom, 0.0))
        noise = np.maximum(s2 * sums[:, _VOLUME2] / volume**2, (_EXACT * outcome.sum() / volume.sum()) ** 2)
        languages = self._languages()
        members = np.array([languages[_source(pair)] for pair in self._rows])
        return shrink(mean, noise, members)

    def _languages(self) -> dict[str, int]:
        """Number of each source language seen."""
        return {language: i for i, language in enumerate(dict.fromkeys(map(_source, self._rows)))}

    def _row(self, pair: str) -> int:
        row = self._rows.get(pair)
        if row is None:
            _source(pair)
            row = self._rows[pair] = len(self._rows)
            for ratio in RATIOS:
                self._sums[ratio] = np.concatenate([self._sums[ratio], np.zeros((1, 5))])
        return row

    def _fade(self, time_s: float) -> None:
        if self._time_s is None:
            self._time_s = time_s
        if self.half_life_s is None or time_s - self._time_s < _FADE_STEP * self.half_life_s:
            return
        fading = 0.5 ** ((time_s - self._time_s) / self.half_life_s)
        self._time_s = time_s
        for ratio in RATIOS:
            self._sums[ratio] *= np.array([fading] * 4 + [fading * fading])
        # What has faded below a character says nothing and would divide by 0 one day.
        self._keep(self._sums["fertility"][:, _VOLUME] >= 1.0)

    def _drop(self) -> None:
        surplus = len(self._rows) - self.max_pairs
        if surplus > 0:
            kept = np.ones(len(self._rows), bool)
            kept[np.argsort(self._sums["fertility"][:, _VOLUME], kind="stable")[:surplus]] = False
            self._keep(kept)

    def _keep(self, kept: Any) -> None:
        if not kept.all():
            self._rows = {pair: row for row, pair in enumerate(np.array(list(self._rows), object)[kept])}
            self._sums = {ratio: sums[kept] for ratio, sums in self._sums.items()}
            self._estimates = None


def _source(pair: str) -> str:
    source, _, target = pair.partition("-")
    if not (source and target):
        raise LengthsError(f"pair {pair!r}: write source-target, such as eng_Latn-deu_Latn")
    return source
