"""Traffic by language pair on its way from a replica to the planner, through the same series as its other counters.

A replica counts since it started and reports a number for each (pair, count) as a metric of its own. Only so many pairs have
numbers of their own, those it met first; all others share one, so that sums stay right and a report stays small.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from app.autoscaling.feed import Series
from app.cost.lengths import PairTraffic
from app.cost.traces import Floats
from engine.types import Translation, TranslationRequest

MAX_PAIRS = 16
OTHERS = "others-others"
_PREFIX = "pair"
# sentences offered and their characters; of the finished ones characters, source and target tokens
_COUNTS = ("offered_sentences", "offered_chars", "finished_chars", "source_tokens", "target_tokens")
_Counts = dict[str, Floats]  # float64[5] by pair


class PairCounter:
    """What a replica counts; any thread may call."""

    def __init__(self) -> None:
        self._counts: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def offered(self, requests: Iterable[TranslationRequest]) -> None:
        """Sentences that came, whether they are answered or refused."""
        with self._lock:
            for request in requests:
                counts = self._of(request)
                counts[0] += 1
                counts[1] += len(request.source_text)

    def finished(self, requests: Iterable[TranslationRequest], translations: Iterable[Translation]) -> None:
        """Their translations; those without a text do not count."""
        with self._lock:
            for request, translation in zip(requests, translations, strict=True):
                if translation.ok:
                    counts = self._of(request)
                    counts[2] += len(request.source_text)
                    counts[3] += translation.num_source_tokens
                    counts[4] += translation.num_target_tokens

    def report(self) -> dict[str, float]:
        """Metrics by name, for record_autoscaling_stats."""
        with self._lock:
            return {
                f"{_PREFIX} {pair} {name}": float(value)
                for pair, counts in self._counts.items()
                for name, value in zip(_COUNTS, counts, strict=True)
            }

    def _of(self, request: TranslationRequest) -> list[float]:
        pair = f"{request.src_lang}-{request.tgt_lang}"
        if pair not in self._counts and len(self._counts) >= MAX_PAIRS:
            pair = OTHERS
        return self._counts.setdefault(pair, [0.0] * len(_COUNTS))


@dataclass(frozen=True, slots=True)
class PairIncrease:
    """What a pool counted for one pair since the last look: sentences and characters offered, and what was finished."""

    offered_sentences: float
    offered_chars: float
    finished: PairTraffic


class PairMeter:
    """Turns the counters of one pool's replicas into increases. A replica's first report is where counting begins, so a
    planner that starts late takes no past for present.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, _Counts] = {}

    def read(self, running: Iterable[Hashable], series: Series) -> dict[str, PairIncrease]:
        """By pair, of the replicas that run. series as in app.autoscaling.feed."""
        increases: dict[str, Floats] = {}
        known = {}
        for replica, counts in _newest(running, series).items():
            before = self._last.get(replica, counts)
            for pair, now in counts.items():
                grown = np.maximum(now - before.get(pair, 0.0), 0.0)
                increases[pair] = increases.get(pair, np.zeros(len(_COUNTS))) + grown
            known[replica] = {**before, **counts}
        self._last = known
        return {
            pair: PairIncrease(float(sums[0]), float(sums[1]), PairTraffic(*sums[2:].tolist()))
            for pair, sums in increases.items()
        }


def _newest(running: Iterable[Hashable], series: Series) -> dict[Hashable, _Counts]:
    """The newest counts of each pair, by replica that runs; those not yet reported are left out."""
    newest: dict[Hashable, _Counts] = {replica: {} for replica in running}
    for pair in dict.fromkeys(name.split(" ")[1] for name in series if name.startswith(f"{_PREFIX} ")):
        columns = [series.get(f"{_PREFIX} {pair} {name}", {}) for name in _COUNTS]
        for replica, counts in newest.items():
            values = [points[-1].value for column in columns if (points := column.get(replica))]
            if len(values) == len(_COUNTS) and np.isfinite(values).all():
                counts[pair] = np.array(values, np.float64)
    return newest
