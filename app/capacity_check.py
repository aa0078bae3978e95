"""The capacity model against live runs of the engine: profiles and runs take turns, the median of the rounds counts.

A cell is a pair of languages, a length of source and a beam size. Its sentences are held-out texts of the demonstration
model; how many tokens and decode steps each takes is learnt beforehand, one at a time. In every round the engine is profiled
anew, the model predicts the highest rate and the p99 at 70 % of it, and the same sentences are then translated live, at the
same instants.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.cost.continuous import Sentences, max_rate_per_s, replay_engine
from app.cost.profile import Profile
from app.cost.traces import Floats
from engine.config import EngineConfig, ModelConfig

if TYPE_CHECKING:
    from app.engine_timing import EngineTimer, WallClock
    from engine.tokenizer import Tokenizer
    from engine.translator import Translator

PAIRS = (("eng_Latn", "deu_Latn"), ("eng_Latn", "jpn_Jpan"), ("fra_Latn", "eng_Latn"))
LENGTHS = {"short": (3, 9), "long": (14, 40)}  # source tokens with tag and eos
BEAMS = (1, 4)
LOAD = 0.7
P99_TOLERANCE, RATE_TOLERANCE = 0.15, 0.10
_NUM_TEXTS = 40


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

    tokenizer, runner = Tokenizer.from_checkpoint(checkpoint), load_runner(checkpoint, config)
    translator = Translator(tokenizer, Scheduler(config), runner, config)
    model = ModelConfig.from_checkpoint(checkpoint)
    timers = {beam: EngineTimer(runner, model, config, beam, clock) for beam in BEAMS}
    cells = [Cell(*pair, length, beam) for pair in PAIRS for length in LENGTHS for beam in BEAMS]
    known = {cell: _learn(translator, tokenizer, cell) for cell in cells}
    results = tuple(CellResult(cell) for cell in cells)
    with tqdm(total=num_rounds * len(cells), unit="cell", desc="validate", disable=None) as bar:
        for round_ in range(num_rounds):
            for number, result in enumerate(results):
                cell = result.cell
                profile = _profile(timers[cell.beam_size], tokenizer, config)
                drawn = np.random.default_rng([round_, number]).integers(len(known[cell][0]), size=num_sentences)
                _run_cell(translator, config, profile, result, known[cell], drawn, clock)
                bar.update()
    return CapacityReport(results)


def _profile(timer: EngineTimer, tokenizer: Tokenizer, config: EngineConfig) -> Profile:
    """A quick one, seconds before the run it is for."""
    from app.engine_timing import EncodeTiming, StepTiming, fit_profile, host_seconds

    timings = [timing for num_steps in (2, 2, 30) for timing in timer.measure(num_steps)]
    return fit_profile(
        [timing for timing in timings if isinstance(timing, EncodeTiming)],
        [timing for timing in timings if isinstance(timing, StepTiming)],
        device="here",
        model="demonstration model",
        config=config,
        beam_size=timer.beam_size,
        startup_s=0.0,
        host_s=host_seconds(tokenizer, ["The file could not be saved."] * 50, PAIRS[0]),
    )


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
    profile: Profile,
    result: CellResult,
    known: tuple[list[str], Sentences],
    drawn: Any,
    clock: WallClock,
) -> None:
    """Predict, run, note the ratios."""
    texts, sentences = [known[0][index] for index in drawn], Sentences(known[1].source_tokens[drawn], known[1].steps[drawn])
    rate = max_rate_per_s(profile, config, sentences)
    gaps = np.random.default_rng(len(drawn)).exponential(1.0, len(drawn))
    arrival_s = gaps.cumsum() / (LOAD * rate)
    predicted = float(np.quantile(replay_engine(profile, config, sentences, arrival_s), 0.99))
    live_rate = len(texts) / float(run_live(translator, texts, result.cell, np.zeros(len(texts)), clock).max())
    live_p99 = float(np.quantile(run_live(translator, texts, result.cell, arrival_s, clock), 0.99))
    result.rate.append(rate / live_rate)
    result.p99.append(predicted / live_p99)
    result.live_rate_per_s.append(live_rate)
    result.live_p99_s.append(live_p99)


def run_live(translator: Translator, texts: Sequence[str], cell: Cell, arrival_s: Floats, clock: WallClock) -> Floats:
    """Latency float64[N] of texts translated live, each submitted at its instant or as soon after as a step allows."""
    from engine.types import TranslationRequest

    search = _search(cell)
    waiting = deque(range(len(texts)))
    latency = np.full(len(texts), np.nan)
    started = clock.now()
    while waiting or translator.has_work:
        now = clock.now() - started
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
