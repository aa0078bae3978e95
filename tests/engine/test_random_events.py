"""Random submits, cancels, deadlines and finishes against the kernel engine: nothing leaks, and company changes no bit.

Each finished sentence is compared with the same engine translating it alone, in the batch-invariant mode: equal scores as
floats, equal ids. Here in Triton's interpreter with few events; on a GPU captured, with ten thousand.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.model.layers
import engine.quantization.cpu_experts
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import EngineFullError, FinishReason, SearchOptions, Translation, TranslationRequest
from engine.weights.loading import load_transformer
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import TINY_LANGUAGES, random_texts, write_tiny_tokenizer

SHAPE = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 71, "num_experts": 5}
CONFIG = EngineConfig(
    precision="w4a16",
    activation_dtype="float32",
    max_rows=21,
    max_source_slots=9,
    max_target_tokens=14,
    max_source_tokens=48,
    encode_token_budget=96,
    max_waiting=16,
    batch_invariant=True,
)
SECOND = 1.0  # of the scheduler's clock, which advances by one a step


class Ticks:
    """The scheduler's clock: it moves when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


Answer = tuple[tuple[tuple[int, ...], float], ...]


class Jobs:
    """A pool of different sentences with random search options, and what each gives when it is alone in the engine."""

    def __init__(self, count: int, seed: int, *, longest: int, beams: Sequence[int], with_ngrams: bool) -> None:
        generator = np.random.default_rng(seed)
        self._texts = random_texts(count, seed=seed, max_words=5)
        self._searches = [_random_search(generator, longest, beams, with_ngrams=with_ngrams) for _ in range(count)]
        self._alone: dict[int, Answer] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def request(self, name: str, job: int, time_budget_s: float | None = None) -> TranslationRequest:
        source, target = TINY_LANGUAGES[job % 3], TINY_LANGUAGES[job // 3 % 3]
        return TranslationRequest(name, self._texts[job], source, target, self._searches[job], time_budget_s=time_budget_s)

    def alone(self, translator: Translator, job: int) -> Answer:
        if job not in self._alone:
            assert not translator.has_work
            translator.submit(self.request("alone", job))
            ended: list[Translation] = []
            while translator.has_work:
                ended += translator.step()
            self._alone[job] = answer(ended[0])
        return self._alone[job]


def _random_search(
    generator: np.random.Generator, longest: int, beams: Sequence[int], *, with_ngrams: bool
) -> SearchOptions:
    beam = int(generator.choice(beams))
    most = int(generator.integers(3, longest + 1))
    return SearchOptions(
        beam_size=beam,
        max_target_tokens=most,
        min_target_tokens=int(generator.integers(0, most)),
        num_hypotheses=int(generator.integers(1, beam + 1)),
        length_penalty=float(generator.choice([0.0, 0.6, 1.0, 1.4])),
        early_stopping=[False, True, "never"][int(generator.integers(3))],  # type: ignore[arg-type]
        no_repeat_ngram_size=int(generator.choice([0, 0, 2])) if with_ngrams else 0,
    )


def answer(translation: Translation) -> Answer:
    assert translation.ok, translation.error
    return tuple((hypothesis.target_token_ids, hypothesis.score) for hypothesis in translation.hypotheses)


@dataclasses.dataclass(slots=True)
class Tally:
    """What was asked of the engine and what came back, by request id."""

    jobs: dict[str, int] = dataclasses.field(default_factory=dict)
    cancelled: set[str] = dataclasses.field(default_factory=set)
    timed: set[str] = dataclasses.field(default_factory=set)
    ended: dict[str, Translation] = dataclasses.field(default_factory=dict)

    @property
    def num_events(self) -> int:
        return len(self.jobs) + len(self.cancelled) + len(self.ended)

    def note(self, ended: list[Translation]) -> None:
        for translation in ended:
            assert translation.request_id not in self.ended, "a sentence came back twice"
            self.ended[translation.request_id] = translation


def play(translator: Translator, clock: Ticks, jobs: Jobs, num_events: int, seed: int) -> Tally:
    """Random events until there are `num_events`, then steps until the engine is empty. The same seed, the same play."""
    generator = np.random.default_rng(seed)
    tally = Tally()
    while tally.num_events < num_events:
        what = generator.random()
        if what < 0.5:
            name, job = str(len(tally.jobs)), int(generator.integers(len(jobs)))
            budget = float(generator.integers(0, 25)) * SECOND if generator.random() < 0.2 else None
            try:
                translator.submit(jobs.request(name, job, budget))
            except EngineFullError:
                _step(translator, clock, tally)
                continue
            tally.jobs[name] = job
            if budget is not None:
                tally.timed.add(name)
        elif what < 0.65 and tally.jobs:
            name = str(int(generator.integers(max(0, len(tally.jobs) - 20), len(tally.jobs))))
            is_there = name not in tally.ended
            assert translator.cancel(name) is is_there
            if is_there:
                tally.cancelled.add(name)
        else:
            _step(translator, clock, tally)
    while translator.has_work:
        _step(translator, clock, tally)
    return tally


def _step(translator: Translator, clock: Ticks, tally: Tally) -> None:
    clock.now += SECOND
    tally.note(translator.step())


def check(tally: Tally, jobs: Jobs, translator: Translator) -> int:
    """All came back once and for a reason; what finished is bit for bit what it is alone. Returns how many finished."""
    assert tally.ended.keys() == tally.jobs.keys()
    finished = 0
    for name, translation in tally.ended.items():
        if translation.finish_reason is FinishReason.CANCELLED:
            assert name in tally.cancelled
        elif translation.finish_reason is FinishReason.DEADLINE:
            assert name in tally.timed
        else:
            finished += 1
            assert name not in tally.cancelled
            assert answer(translation) == jobs.alone(translator, tally.jobs[name]), f"sentence {name}"
    stats = translator.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_live_rows) == (0, 0, 0)
    assert stats.num_retries == 0
    return finished


def make_translator(directory: Path, config: EngineConfig, clock: Ticks, **overrides: int) -> Translator:
    make_tiny_checkpoint(write_tiny_tokenizer(directory), seed=5, eos_bias=3.0, **{**SHAPE, **overrides})
    runner = DeviceRunner(load_transformer(directory, config), config)
    return Translator(Tokenizer.from_checkpoint(directory), Scheduler(config, clock=clock), runner, config)


def test_random_events_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report_figure: Callable[[str], None]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    monkeypatch.setattr(engine.model.layers, "can_pack", lambda dtype, device: False)
    monkeypatch.setattr(engine.quantization.cpu_experts, "can_pack", lambda dtype, device: False)
    clock = Ticks()
    config = dataclasses.replace(CONFIG, max_rows=7, max_source_slots=4, encode_token_budget=48)
    one_layer = {"encoder_layers": 1, "decoder_layers": 1, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    translator = make_translator(tmp_path, config, clock, **one_layer)
    jobs = Jobs(3, seed=1, longest=4, beams=[1, 2, 3], with_ngrams=False)
    tally = play(translator, clock, jobs, 20, seed=2)
    finished = check(tally, jobs, translator)
    assert finished >= 2
    assert tally.cancelled
    report_figure(f"random events (interpreter): {tally.num_events}, {finished} finished")


@pytest.mark.gpu
@pytest.mark.parametrize("activation_dtype", ["float32", "bfloat16"])
def test_ten_thousand_random_events_on_a_gpu(
    tmp_path: Path, activation_dtype: str, report_figure: Callable[[str], None]
) -> None:
    """The second half repeats the first: what is captured at first use is there by then, so not one byte may be added."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    config = dataclasses.replace(CONFIG, device="cuda", activation_dtype=activation_dtype)  # type: ignore[arg-type]
    clock = Ticks()
    translator = make_translator(tmp_path, config, clock)
    jobs = Jobs(120, seed=1, longest=14, beams=[1, 1, 2, 3, 4, 5, 8], with_ngrams=True)
    num_finished, bytes_held = 0, []
    for _ in range(2):
        tally = play(translator, clock, jobs, 5_000, seed=3)
        num_finished += check(tally, jobs, translator)
        torch.cuda.synchronize()
        gc.collect()
        bytes_held.append(torch.cuda.memory_allocated())
    assert bytes_held[0] == bytes_held[1]
    assert num_finished > 2_000
    assert len(tally.cancelled) > 300
    assert any(t.finish_reason is FinishReason.DEADLINE for t in tally.ended.values())
    report_figure(
        f"random events (GPU, {activation_dtype}): 10,000, {num_finished} finished, all equal to the same sentence alone, "
        f"{bytes_held[1] / 2**20:.1f} MiB held after each half"
    )
