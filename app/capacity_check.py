"""The capacity model against live runs of the engine: profiles and runs take turns, the median of the rounds counts.

A cell is a pair of languages, a length of source and a beam size. Its sentences are held-out texts of the demonstration
model; how many tokens and decode steps each takes is learnt beforehand, one at a time. In every round they are translated
live, first all at once, then as they arrive at 70 % of the rate that the model predicts. Every fraction of a second the live
run stands still and the engine (another runner of the same weights) is profiled for as long, so that both see the same
machine. The profile of the cell and round then predicts the highest rate, and the p99 for the same instants.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.cost.continuous import Sentences, max_rate_per_s, replay_engine
from app.cost.profile import Profile
from app.cost.traces import Floats
from engine.config import EngineConfig, ModelConfig

if TYPE_CHECKING:
    from app.engine_timing import EngineTimer, Timing, WallClock
    from engine.tokenizer import Tokenizer
    from engine.translator import Translator

PAIRS = (("eng_Latn", "deu_Latn"), ("eng_Latn", "jpn_Jpan"), ("fra_Latn", "eng_Latn"))
LENGTHS = {"short": (3, 9), "long": (14, 40)}  # source tokens with tag and eos
BEAMS = (1, 4)
LOAD = 0.7
P99_TOLERANCE, RATE_TOLERANCE = 0.15, 0.10
_NUM_TEXTS = 40
_TURN_S = 0.15
_TIMES = {"short": 3, "long": 1}  # the sentences asked for: short ones are over in no time
_STEPS_OF_A_LOAD = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """What one row of the report is about."""

    source: str
    target: str
    length: str
    beam_size: int

    def __str__(self) -> str:
        return f"{self.source}-{self.target} {self.length} beam {self.beam_size}"


@dataclass(frozen=True, slots=True)
class CellResult:
    """Predicted over live, one entry per round."""

    cell: Cell
    p99: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    live_p99_s: list[float] = field(default_factory=list)
    live_rate_per_s: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Both medians within their tolerances."""
        return self._within(self.p99, P99_TOLERANCE) and self._within(self.rate, RATE_TOLERANCE)

    @staticmethod
    def _within(ratios: Sequence[float], tolerance: float) -> bool:
        return abs(float(np.median(ratios)) - 1) <= tolerance


@dataclass(frozen=True, slots=True)
class CapacityReport:
    """All cells."""

    results: tuple[CellResult, ...]

    @property
    def passed(self) -> bool:
        """All cells within the tolerances."""
        return all(result.passed for result in self.results)

    def table(self) -> str:
        """For a terminal."""
        lines = [f"{'cell':<34} {'p99 live':>9} {'predicted':>9} {'rate live':>9} {'predicted':>9}"]
        for result in self.results:
            p99, rate = float(np.median(result.live_p99_s)), float(np.median(result.live_rate_per_s))
            lines.append(
                f"{result.cell!s:<34} {p99:>8.3f}s {np.median(result.p99) - 1:>+9.1%} {rate:>7.1f}/s"
                f" {np.median(result.rate) - 1:>+9.1%}{'' if result.passed else '   outside'}"
            )
        good = sum(result.passed for result in self.results)
        lines.append(f"{good} of {len(self.results)} cells within {P99_TOLERANCE:.0%} (p99) and {RATE_TOLERANCE:.0%} (rate)")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Every round of every cell."""
        return json.dumps([asdict(result) | {"passed": result.passed} for result in self.results], indent=1) + "\n"


def check_capacity(
    checkpoint: Path, config: EngineConfig, num_rounds: int, num_sentences: int, clock: WallClock
) -> CapacityReport:
    """Run everything on this clock, with a progress bar."""
    from tqdm import tqdm

    from app.engine_timing import EngineTimer
    from engine.device_runner import load_runner
    from engine.scheduler import Scheduler
    from engine.tokenizer import Tokenizer
    from engine.translator import Translator

    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    translator = Translator(tokenizer, Scheduler(config), load_runner(checkpoint, config), config)
    model, profiled = ModelConfig.from_checkpoint(checkpoint), load_runner(checkpoint, config)
    profilers = {beam: _Profiler(EngineTimer(profiled, model, config, beam, clock), tokenizer, config) for beam in BEAMS}
    cells = [Cell(*pair, length, beam) for pair in PAIRS for length in LENGTHS for beam in BEAMS]
    known = {cell: _learn(translator, tokenizer, cell) for cell in cells}
    results = tuple(CellResult(cell) for cell in cells)
    with tqdm(total=num_rounds * len(cells), unit="cell", desc="validate", disable=None) as bar:
        for round_ in range(num_rounds):
            for number, result in enumerate(results):
                count = num_sentences * _TIMES[result.cell.length]
                drawn = np.random.default_rng([round_, number]).integers(len(known[result.cell][0]), size=count)
                _run_cell(translator, config, profilers[result.cell.beam_size], result, known[result.cell], drawn, clock)
                bar.update()
    return CapacityReport(results)


class _Profiler:
    """Profiles the engine bit by bit, between the steps of a live run."""

    def __init__(self, timer: EngineTimer, tokenizer: Tokenizer, config: EngineConfig) -> None:
        from app.engine_profile import host_seconds

        self._timer, self._config = timer, config
        self._host_s = host_seconds(tokenizer, ["The file could not be saved."] * 50, PAIRS[0])
        for _ in timer.measure(3):
            pass  # warms up
        self.begin()

    def begin(self) -> None:
        """Forget the timings so far."""
        self._timings: list[Timing] = []
        self._loads = self._timer.measure(_STEPS_OF_A_LOAD)
        self._is_round_complete = False

    def turn(self, clock: WallClock) -> None:
        """Measure for about _TURN_S."""
        ends = clock.now() + _TURN_S
        while clock.now() < ends:
            self._measure()

    def profile(self) -> Profile:
        """From all timings since `begin`; completes a round of all sizes if need be."""
        from app.engine_profile import fit_profile

        while not self._is_round_complete:
            self._measure()
        return fit_profile(
            self._timings,
            device="here",
            model="demonstration model",
            config=self._config,
            beam_size=self._timer.beam_size,
            length_step=self._timer.length_step,
            startup_s=0.0,
            host_s=self._host_s,
        )

    def _measure(self) -> None:
        timings = next(self._loads, None)
        if timings is None:
            self._is_round_complete = True
            self._loads = self._timer.measure(_STEPS_OF_A_LOAD)
        else:
            self._timings += timings


def _learn(translator: Translator, tokenizer: Tokenizer, cell: Cell) -> tuple[list[str], Sentences]:
    """Held-out texts of the cell, and the source tokens and decode steps of each, translated alone."""
    from engine.demo.evaluation import read_heldout

    low, high = LENGTHS[cell.length]
    groups = [group["texts"] for group in read_heldout() if cell.source in group["texts"]]
    texts, tokens, steps = [], [], []
    for group in groups:
        text = group[cell.source]
        num_tokens = len(tokenizer.encode(text, cell.source))
        if not low <= num_tokens <= high or "\n" in text:
            continue
        before = translator.stats().num_decode_steps
        translator.translate([text], src_lang=cell.source, tgt_lang=cell.target, search=_search(cell))
        texts.append(text)
        tokens.append(num_tokens)
        steps.append(translator.stats().num_decode_steps - before)
        if len(texts) == _NUM_TEXTS:
            break
    return texts, Sentences(np.array(tokens), np.array(steps))


def _search(cell: Cell) -> Any:
    from engine.types import SearchOptions

    return SearchOptions(beam_size=cell.beam_size)


def _run_cell(
    translator: Translator,
    config: EngineConfig,
    profiler: _Profiler,
    result: CellResult,
    known: tuple[list[str], Sentences],
    drawn: Any,
    clock: WallClock,
) -> None:
    """Run, profile, predict, note the ratios."""
    texts, sentences = [known[0][index] for index in drawn], Sentences(known[1].source_tokens[drawn], known[1].steps[drawn])
    profiler.begin()
    at_once = run_live(translator, texts, result.cell, np.zeros(len(texts)), clock, profiler.turn)
    gaps = np.random.default_rng(len(drawn)).exponential(1.0, len(drawn))
    arrival_s = gaps.cumsum() / (LOAD * max_rate_per_s(profiler.profile(), config, sentences))
    spread = run_live(translator, texts, result.cell, arrival_s, clock, profiler.turn)
    profile = profiler.profile()
    predicted = replay_engine(profile, config, sentences, arrival_s)
    live_rate, live_p99 = len(texts) / float(at_once.max()), float(np.quantile(spread, 0.99))
    result.rate.append(max_rate_per_s(profile, config, sentences) / live_rate)
    result.p99.append(float(np.quantile(predicted, 0.99)) / live_p99)
    result.live_rate_per_s.append(live_rate)
    result.live_p99_s.append(live_p99)


def run_live(
    translator: Translator,
    texts: Sequence[str],
    cell: Cell,
    arrival_s: Floats,
    clock: WallClock,
    turn: Callable[[WallClock], None] | None = None,
) -> Floats:
    """Latency float64[N] of texts translated live, each submitted at its instant or as soon after as a step allows.

    turn: called after every _TURN_S; the run's time stands still meanwhile.
    """
    from engine.types import TranslationRequest

    search = _search(cell)
    waiting = deque(range(len(texts)))
    latency = np.full(len(texts), np.nan)
    started, last_turn = clock.now(), 0.0  # moved on by what turns take
    while waiting or translator.has_work:
        now = clock.now() - started
        if turn is not None and now - last_turn >= _TURN_S:
            turn(clock)
            started, last_turn = clock.now() - now, now
        while waiting and arrival_s[waiting[0]] <= now:
            index = waiting.popleft()
            translator.submit(TranslationRequest(str(index), texts[index], cell.source, cell.target, search))
        if not translator.has_work:
            clock.wait(max(0.0, arrival_s[waiting[0]] - now))
            continue
        for translation in translator.step():
            if not translation.ok:
                raise RuntimeError(f"a sentence of {cell} failed: {translation.error}")
            index = int(translation.request_id)
            latency[index] = clock.now() - started - arrival_s[index]
    return latency
