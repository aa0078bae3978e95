"""Live runs of the engine under a clock, and how the machine's pace changed meanwhile.

Torch loads inside the functions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.cost.continuous import Sentences, replay_engine
from app.cost.profile import Profile
from app.cost.traces import Floats
from engine.config import EngineConfig
from engine.types import SearchOptions, TranslationRequest

if TYPE_CHECKING:
    from app.clocks import WallClock
    from engine.tokenizer import Tokenizer
    from engine.translator import Translator

TURN_S = 0.15
_FOR_EVER = 1e9


@dataclass(frozen=True, slots=True)
class Cell:
    """What is translated: a pair of languages, a length of source ("short" or "long") and a beam size."""

    source: str
    target: str
    length: str
    beam_size: int

    def __str__(self) -> str:
        return f"{self.source}-{self.target} {self.length} beam {self.beam_size}"

    def request(self, number: int, text: str) -> TranslationRequest:
        """To translate this text; its id is the number."""
        return TranslationRequest(str(number), text, self.source, self.target, SearchOptions(beam_size=self.beam_size))


class Pace:
    """How slow a machine was at times float64[K], rising from 0: it took `slowness` float64[K] times as long as usual.

    In between it is the mean of both ends, after the last as there. `work_s` and `instants` turn seconds of a run into the
    usual seconds that the machine's work took until then, and back: float64[N] -> float64[N].
    """

    def __init__(self, times: Floats, slowness: Floats) -> None:
        following = np.append(slowness[1:], slowness[-1])
        self._times = np.append(times, times[-1] + _FOR_EVER)
        self._work = np.append(0.0, (np.diff(self._times) * 2 / (slowness + following)).cumsum())

    def work_s(self, instants: Floats) -> Floats:
        """See the class."""
        return np.asarray(np.interp(instants, self._times, self._work))

    def instants(self, work_s: Floats) -> Floats:
        """See the class."""
        return np.asarray(np.interp(work_s, self._work, self._times))


def predict_latency(profile: Profile, config: EngineConfig, sentences: Sentences, arrival_s: Floats, pace: Pace) -> Floats:
    """Latency float64[N] by the capacity model on a machine of this pace."""
    work = pace.work_s(arrival_s)
    return pace.instants(work + replay_engine(profile, config, sentences, work)) - arrival_s


def learn_sentences(
    translator: Translator, tokenizer: Tokenizer, config: EngineConfig, cell: Cell, texts: Sequence[str]
) -> Sentences:
    """Source tokens and decode steps of each text. What is translated beside a sentence does not change its steps, so as
    many as fit start together.
    """
    tokens = np.array([len(tokenizer.encode(text, cell.source)) for text in texts])
    steps = np.zeros(len(texts), np.int64)
    together = min(config.max_source_slots, config.max_rows // cell.beam_size, config.encode_token_budget // tokens.max())
    for first in range(0, len(texts), together):
        for index in range(first, min(first + together, len(texts))):
            translator.submit(cell.request(index, texts[index]))
        num_steps = 0
        while translator.has_work:
            num_steps += 1
            steps[[int(ended.request_id) for ended in translator.step()]] = num_steps
    return Sentences(tokens, steps)


def run_live(
    translator: Translator,
    texts: Sequence[str],
    cell: Cell,
    arrival_s: Floats,
    clock: WallClock,
    turn: Callable[[float], None] | None = None,
) -> Floats:
    """Latency float64[N] of texts translated live, each submitted at its instant or as soon after as a step allows.

    turn: called with the run's time at its start and every TURN_S; the run's time stands still meanwhile.
    """
    waiting = deque(range(len(texts)))
    latency = np.full(len(texts), np.nan)
    started, next_turn = clock.now(), 0.0  # started: moved on by what turns take
    while waiting or translator.has_work:
        now = clock.now() - started
        if turn is not None and now >= next_turn:
            turn(now)
            started, next_turn = clock.now() - now, now + TURN_S
        while waiting and arrival_s[waiting[0]] <= now:
            index = waiting.popleft()
            translator.submit(cell.request(index, texts[index]))
        if not translator.has_work:
            clock.wait(max(0.0, arrival_s[waiting[0]] - now))
            continue
        for translation in translator.step():
            if not translation.ok:
                raise RuntimeError(f"a sentence of {cell} failed: {translation.error}")
            index = int(translation.request_id)
            latency[index] = clock.now() - started - arrival_s[index]
    return latency
