"""The capacity model against live runs of the engine: profiles and runs take turns, the median of the rounds counts.

A cell is a pair of languages, a length of source and a beam size. Its sentences are held-out texts of the demonstration
model; how many tokens and decode steps each takes is learnt beforehand. In every round they are translated live, first half
of them at once, then all as they arrive at 70 % of the rate that the model predicts. Every fraction of a second the live run
stands still and the engine is profiled for as long (by another runner of the same weights: copies would lie differently in
the caches), so that both see the same machine. The profile of the cell and round then predicts the highest rate, and the p99
for the same instants. Where the machine was slower for a while, by the profile's turns at that time, so it is in the
prediction; the figures without that are kept beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.cost.continuous import Sentences, max_rate_per_s, replay_engine
from app.cost.profile import Profile
from app.cost.traces import Floats
from app.live_run import TURN_S, Cell, Pace, learn_sentences, predict_latency, run_live
from engine.config import EngineConfig, ModelConfig

if TYPE_CHECKING:
    from app.clocks import WallClock
    from app.engine_timing import EngineTimer, Timing
    from engine.tokenizer import Tokenizer
    from engine.translator import Translator

PAIRS = (("eng_Latn", "deu_Latn"), ("eng_Latn", "jpn_Jpan"), ("fra_Latn", "eng_Latn"))
LENGTHS = {"short": (3, 9), "long": (14, 40)}  # source tokens with tag and eos
BEAMS = (1, 4)
LOAD = 0.7
P99_TOLERANCE, RATE_TOLERANCE = 0.15, 0.10
_NUM_TEXTS = 64
# Times the sentences asked for, so that all cells run for about as long.
_TIMES = {("short", 1): 8, ("short", 4): 4, ("long", 1): 2, ("long", 4): 1}
_STEPS_OF_A_LOAD = 8


@dataclass(frozen=True, slots=True)
class CellResult:
    """Predicted over live, one entry per round; steady_*: predicted for a machine of steady pace."""

    cell: Cell
    p99: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    live_p99_s: list[float] = field(default_factory=list)
    live_rate_per_s: list[float] = field(default_factory=list)
    steady_p99: list[float] = field(default_factory=list)
    steady_rate: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Both medians within their tolerances."""
        return self._within(self.p99, P99_TOLERANCE) and self._within(self.rate, RATE_TOLERANCE)

    @property
    def passed_steadily(self) -> bool:
        """The same of what was predicted for a machine of steady pace."""
        return self._within(self.steady_p99, P99_TOLERANCE) and self._within(self.steady_rate, RATE_TOLERANCE)

    @staticmethod
    def _within(ratios: Sequence[float], tolerance: float) -> bool:
        return abs(float(np.median(ratios)) - 1) <= tolerance

    def __str__(self) -> str:
        p99, rate = float(np.median(self.live_p99_s)), float(np.median(self.live_rate_per_s))
        return (
            f"{self.cell!s:<34} {p99:>8.3f}s {np.median(self.p99) - 1:>+9.1%} {rate:>7.1f}/s"
            f" {np.median(self.rate) - 1:>+9.1%}{'' if self.passed else '   outside'}"
        )


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
        good = sum(result.passed for result in self.results)
        lines += map(str, self.results)
        lines.append(f"{good} of {len(self.results)} cells within {P99_TOLERANCE:.0%} (p99) and {RATE_TOLERANCE:.0%} (rate)")
        steady = sum(result.passed_steadily for result in self.results)
        lines.append(
            f"{steady} if the machine is taken to be of steady pace, which the profile's turns say it was not quite"
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Every round of every cell."""
        return json.dumps([asdict(result) | {"passed": result.passed} for result in self.results], indent=1) + "\n"


def check_capacity(
    checkpoint: Path, config: EngineConfig, num_rounds: int, num_sentences: int, clock: WallClock
) -> CapacityReport:
    """Run everything on this clock, with a progress bar and a line for every cell and round."""
    from tqdm import tqdm

    results = tuple(CellResult(Cell(*pair, length, beam)) for pair in PAIRS for length in LENGTHS for beam in BEAMS)
    with tqdm(total=num_rounds * len(results), unit="cell", desc="validate") as bar:
        for round_, result in _rounds(checkpoint, config, results, num_rounds, num_sentences, clock):
            bar.update()
            bar.write(
                f"round {round_ + 1}: {result.cell!s:<34} p99 {result.p99[-1] - 1:>+6.1%}, rate {result.rate[-1] - 1:>+6.1%}"
            )
    return CapacityReport(results)


def _rounds(
    checkpoint: Path,
    config: EngineConfig,
    results: Sequence[CellResult],
    num_rounds: int,
    num_sentences: int,
    clock: WallClock,
) -> Iterator[tuple[int, CellResult]]:
    """(round, result that has just got its figures)."""
    import torch

    from app.engine_timing import EngineTimer
    from engine.bench.ours import make_runner
    from engine.scheduler import Scheduler
    from engine.tokenizer import Tokenizer
    from engine.translator import Translator
    from engine.weights.loading import load_transformer

    torch.set_num_threads(config.num_threads)
    tokenizer, transformer = Tokenizer.from_checkpoint(checkpoint), load_transformer(checkpoint, config)
    translator = Translator(tokenizer, Scheduler(config), make_runner(transformer, config), config)
    model, profiled = ModelConfig.from_checkpoint(checkpoint), make_runner(transformer, config)
    profilers = {beam: _Profiler(EngineTimer(profiled, model, config, beam, clock, tokenizer), config) for beam in BEAMS}
    known = {}
    for round_ in range(num_rounds):
        for number, result in enumerate(results):
            cell = result.cell
            if cell not in known:
                texts = _texts(tokenizer, cell)
                known[cell] = texts, learn_sentences(translator, tokenizer, config, cell, texts)
            texts, sentences = known[cell]
            count = num_sentences * _TIMES[cell.length, cell.beam_size]
            drawn = np.random.default_rng([round_, number]).integers(len(texts), size=count)
            chosen = Sentences(sentences.source_tokens[drawn], sentences.steps[drawn])
            _run_cell(translator, config, profilers[cell.beam_size], [texts[index] for index in drawn], chosen, result)
            yield round_, result


def _texts(tokenizer: Tokenizer, cell: Cell) -> list[str]:
    """Held-out ones of the cell's language and length."""
    from engine.demo.evaluation import read_heldout

    low, high = LENGTHS[cell.length]
    found = [group["texts"][cell.source] for group in read_heldout() if cell.source in group["texts"]]
    fitting = [
        text for text in dict.fromkeys(found) if "\n" not in text and low <= len(tokenizer.encode(text, cell.source)) <= high
    ]
    return fitting[:_NUM_TEXTS]


@dataclass(frozen=True, slots=True)
class _Turn:
    """What was timed when a live run had got that far."""

    run_s: float
    timings: list[Timing]


class _Profiler:
    """Profiles the engine bit by bit, between the steps of a live run."""

    def __init__(self, timer: EngineTimer, config: EngineConfig) -> None:
        self._timer, self._config, self.clock = timer, config, timer.clock
        for _ in timer.measure(3):
            pass  # warms up
        self.begin()

    def begin(self) -> None:
        """Forget the timings so far."""
        self._timings: list[Timing] = []
        self._parts = self._timer.measure(_STEPS_OF_A_LOAD)
        self._is_round_complete = False

    def turn(self, run_s: float) -> _Turn:
        """Measure for about TURN_S."""
        ends, first = self.clock.now() + TURN_S, len(self._timings)
        while len(self._timings) == first or self.clock.now() < ends:
            self._measure()
        return _Turn(run_s, self._timings[first:])

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
            host_s=0.0,
        )

    def pace(self, profile: Profile, turns: Sequence[_Turn]) -> Pace:
        """Of the machine during a live run, against all timings of this profile."""
        from app.engine_profile import expected_seconds

        def slowness(timings: Sequence[Timing]) -> float:
            return sum(timing.seconds for timing in timings) / expected_seconds(profile, timings)

        usual = slowness(self._timings)
        return Pace(np.array([turn.run_s for turn in turns]), np.array([slowness(turn.timings) / usual for turn in turns]))

    def _measure(self) -> None:
        timings = next(self._parts, None)
        if timings is None:
            self._is_round_complete = True
            self._parts = self._timer.measure(_STEPS_OF_A_LOAD)
        else:
            self._timings += timings


def _run_cell(
    translator: Translator,
    config: EngineConfig,
    profiler: _Profiler,
    texts: Sequence[str],
    sentences: Sentences,
    result: CellResult,
) -> None:
    """Run, profile, predict, note the ratios."""

    def live(arrival_s: Floats) -> tuple[Floats, list[_Turn]]:
        turns: list[_Turn] = []
        latency = run_live(
            translator,
            texts[: len(arrival_s)],
            result.cell,
            arrival_s,
            profiler.clock,
            lambda now: turns.append(profiler.turn(now)),
        )
        return latency, turns

    count = max(1, len(texts) // 2)  # a rate is told from fewer sentences than a p99
    at_once, half = np.zeros(count), Sentences(sentences.source_tokens[:count], sentences.steps[:count])
    profiler.begin()
    all_latency, all_turns = live(at_once)
    gaps = np.random.default_rng(len(texts)).exponential(1.0, len(texts))
    arrival_s = gaps.cumsum() / (LOAD * max_rate_per_s(profiler.profile(), config, half))
    latency, turns = live(arrival_s)
    profile = profiler.profile()
    all_predicted = predict_latency(profile, config, half, at_once, profiler.pace(profile, all_turns))
    predicted = predict_latency(profile, config, sentences, arrival_s, profiler.pace(profile, turns))
    steady = replay_engine(profile, config, sentences, arrival_s)
    live_rate, live_p99 = count / float(all_latency.max()), float(np.quantile(latency, 0.99))
    result.rate.append(count / float(all_predicted.max()) / live_rate)
    result.p99.append(float(np.quantile(predicted, 0.99)) / live_p99)
    result.live_rate_per_s.append(live_rate)
    result.live_p99_s.append(live_p99)
    result.steady_rate.append(max_rate_per_s(profile, config, half) / live_rate)
    result.steady_p99.append(float(np.quantile(steady, 0.99)) / live_p99)
