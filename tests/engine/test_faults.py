"""Faults in shared work: the sentence that causes one fails alone, its mates get the ids of an undisturbed run.

A real engine on the CPU in fp32; the faults are put in front of its runner, where a real one would come from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.device_memory import is_out_of_memory
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.search.spec import SearchOutcome, SearchSpec
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import EncodedBatch, FinishReason, SearchOptions, Translation, TranslationRequest
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import random_texts, write_tiny_tokenizer

CONFIG = EngineConfig(
    precision="fp32",
    max_rows=40,
    max_source_slots=12,
    max_target_tokens=12,
    max_source_tokens=24,
    encode_token_budget=80,
    max_waiting=64,
)
POISON = "q"  # the letter is a token of its own
TEXTS = [text for text in random_texts(60, seed=2, max_words=3) if POISON not in text][:30]
SEARCHES = [SearchOptions(beam_size=1, max_target_tokens=8), SearchOptions(beam_size=4, min_target_tokens=6)]
Ids = list[tuple[int, ...]]


class FaultyRunner(Runner):
    """Sentences are known by their slots, as the real device would know them. `faults` says what breaks which call."""

    poison_ids: Collection[int] = ()  # source token ids that mark a sentence
    breaks: str = ""  # encode, start, decode
    once: str = ""  # the next call of this name breaks, whoever is in it
    max_tokens_that_fit: int = 10**9
    num_calls = 0

    def _begin(self, name: str) -> None:
        self.num_calls += 1
        if self.once == name:
            self.once = ""
            raise RuntimeError(f"{name} fault")

    def encode(self, batch: EncodedBatch) -> None:
        self._begin("encode")
        if len(batch.source_token_ids) > self.max_tokens_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        offsets = batch.source_offsets
        for slot, start, stop in zip(batch.source_slots.tolist(), offsets[:-1], offsets[1:], strict=True):
            is_poison = bool(set(self.poison_ids) & set(batch.source_token_ids[start:stop].tolist()))
            self.__dict__.setdefault("poisoned", {})[slot] = is_poison
            if is_poison and self.breaks == "encode":
                raise RuntimeError("poison: encode")
        super().encode(batch)

    def start(self, specs: Sequence[SearchSpec]) -> None:
        self._begin("start")
        self.__dict__.setdefault("running", set()).update(spec.source_slot for spec in specs)
        self._break("start")
        super().start(specs)

    def decode(self) -> list[SearchOutcome]:
        self._begin("decode")
        self._break("decode")
        outcomes = super().decode()
        self.__dict__["running"] -= {outcome.source_slot for outcome in outcomes}
        return outcomes

    def remove(self, source_slots: Collection[int]) -> None:
        self._begin("remove")
        self.__dict__.setdefault("running", set()).difference_update(source_slots)
        super().remove(source_slots)

    def clear(self) -> None:
        self.__dict__["running"] = set()
        super().clear()

    def _break(self, name: str) -> None:
        if self.breaks == name and any(self.__dict__["poisoned"][slot] for slot in self.__dict__["running"]):
            raise RuntimeError(f"poison: {name}")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(write_tiny_tokenizer(tmp_path_factory.mktemp("faults")), seed=4, eos_bias=3.0)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(checkpoint)


MakeFaulty = Callable[..., tuple[Translator, FaultyRunner]]


@pytest.fixture(scope="module")
def make_faulty(checkpoint: Path, tokenizer: Tokenizer) -> MakeFaulty:
    def make(config: EngineConfig = CONFIG, clock: Clock | None = None) -> tuple[Translator, FaultyRunner]:
        runner = FaultyRunner.load(checkpoint, config)
        assert isinstance(runner, FaultyRunner)
        runner.poison_ids = tokenizer.encode(POISON, "eng_Latn").tolist()[2:-1]
        scheduler = Scheduler(config) if clock is None else Scheduler(config, clock=clock)
        return Translator(tokenizer, scheduler, runner, config), runner

    return make


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> dict[tuple[str, int], Ids]:
    """Ids of every text and search, alone in an engine without faults."""
    translator = Translator.load(checkpoint, CONFIG)
    return {
        (text, i): [h.target_token_ids for h in translation.hypotheses]
        for i, search in enumerate(SEARCHES)
        for text, translation in zip(
            TEXTS, translator.translate(TEXTS, src_lang="eng_Latn", tgt_lang="fra_Latn", search=search), strict=True
        )
    }


def request(name: str, text: str, search: int = 1, budget_s: float | None = None) -> TranslationRequest:
    return TranslationRequest(name, text, "eng_Latn", "fra_Latn", SEARCHES[search], time_budget_s=budget_s)


def drain(translator: Translator, *, max_steps: int = 2000) -> dict[str, Translation]:
    ended: dict[str, Translation] = {}
    for _ in range(max_steps):
        if not translator.has_work:
            break
        for translation in translator.step():
            assert translation.request_id not in ended
            ended[translation.request_id] = translation
    assert not translator.has_work, "the engine does not come to an end"
    stats = translator.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_live_rows) == (0, 0, 0)
    return ended


def ids(translation: Translation) -> Ids:
    return [hypothesis.target_token_ids for hypothesis in translation.hypotheses]


@settings(max_examples=25)
@given(
    breaks=st.sampled_from(["encode", "start", "decode"]),
    poison_at=st.sets(st.integers(0, 17), max_size=3),
    steps_between=st.lists(st.integers(0, 3), min_size=18, max_size=18),
    search_of=st.lists(st.integers(0, 1), min_size=18, max_size=18),
)
def test_poison_fails_alone(
    make_faulty: MakeFaulty,
    undisturbed: dict[tuple[str, int], Ids],
    breaks: str,
    poison_at: set[int],
    steps_between: list[int],
    search_of: list[int],
) -> None:
    translator, runner = make_faulty()
    runner.breaks = breaks
    ended: dict[str, Translation] = {}
    for i, num_steps in enumerate(steps_between):
        translator.submit(request(str(i), POISON if i in poison_at else TEXTS[i], search_of[i]))
        for _ in range(num_steps):
            ended |= {t.request_id: t for t in translator.step()}
    ended |= drain(translator)
    for i, search in enumerate(search_of):
        translation = ended[str(i)]
        if i in poison_at:
            assert (translation.finish_reason, translation.error) == (FinishReason.ERROR, f"RuntimeError: poison: {breaks}")
        else:
            assert ids(translation) == undisturbed[TEXTS[i], search]


@pytest.mark.parametrize("operation", ["encode", "start", "decode", "remove"])
def test_a_passing_fault_costs_nobody_their_answer(
    make_faulty: MakeFaulty, undisturbed: dict[tuple[str, int], Ids], operation: str
) -> None:
    translator, runner = make_faulty()
    for i in range(8):
        translator.submit(request(str(i), TEXTS[i]))
    if operation in ("decode", "remove"):
        assert translator.step() == []
    if operation == "remove":
        translator.cancel("3")
    runner.once = operation
    ended = drain(translator)
    failed = {"3"} if operation == "remove" else set()
    assert {name for name, translation in ended.items() if not translation.ok} == failed
    assert {name: ids(t) for name, t in ended.items() if t.ok} == {
        str(i): undisturbed[TEXTS[i], 1] for i in range(8) if str(i) not in failed
    }
    assert translator.stats().num_retries > 0


def test_after_the_poison_batches_are_whole_again(make_faulty: MakeFaulty) -> None:
    translator, runner = make_faulty()
    runner.breaks = "decode"
    for i in range(6):
        translator.submit(request(str(i), POISON if i == 4 else TEXTS[i]))
    assert sum(not translation.ok for translation in drain(translator).values()) == 1
    for i in range(6):
        translator.submit(request(str(i), TEXTS[i]))
    translator.step()
    assert translator.stats().num_running == 6
    drain(translator)


def test_a_dead_device_ends_every_sentence_with_its_reason(make_faulty: MakeFaulty) -> None:
    """Twelve sentences run, twelve wait, every decode step raises: no loop, and few calls."""
    translator, runner = make_faulty()
    runner.poison_ids, runner.breaks = range(1000), "decode"
    for i in range(24):
        translator.submit(request(str(i), TEXTS[i], 0))
    ended = drain(translator)
    assert {t.error for t in ended.values()} == {"RuntimeError: poison: decode"}
    assert len(ended) == translator.stats().num_faults_in_a_row == 24
    assert runner.num_calls < 24 * 3 * 3  # encode, start and decode, at most three times a sentence
    runner.breaks = ""
    translator.submit(request("alive", TEXTS[0]))
    assert drain(translator)["alive"].ok
    assert translator.stats().num_faults_in_a_row == 0


def test_deadlines_and_cancellation_reach_suspects(make_faulty: MakeFaulty) -> None:
    clock = Clock()
    translator, runner = make_faulty(clock=clock)
    for name, budget_s in (("late", 5.0), ("cancelled", None), ("kept", None)):
        translator.submit(request(name, TEXTS[3], budget_s=budget_s))
    translator.step()
    runner.once = "decode"
    assert translator.step() == []
    assert translator.stats().num_waiting == 3
    clock.now_s += 5.0
    assert translator.cancel("cancelled")
    reasons = {t.request_id: t.finish_reason for t in translator.step()}
    assert reasons == {"late": FinishReason.DEADLINE, "cancelled": FinishReason.CANCELLED}
    assert drain(translator)["kept"].ok


def test_an_encoder_pass_that_does_not_fit_is_halved(
    make_faulty: MakeFaulty, undisturbed: dict[tuple[str, int], Ids], tokenizer: Tokenizer
) -> None:
    lengths = [len(tokenizer.encode(text, "eng_Latn")) for text in TEXTS]
    translator, runner = make_faulty()
    runner.max_tokens_that_fit = max(lengths)
    for i in range(20):
        translator.submit(request(str(i), TEXTS[i]))
    ended = drain(translator)
    assert {name: ids(t) for name, t in ended.items()} == {str(i): undisturbed[TEXTS[i], 1] for i in range(20)}
    stats = translator.stats()
    assert (stats.num_retries, stats.num_faults_in_a_row) == (0, 0)


def test_a_sentence_too_large_for_the_memory_fails_alone(make_faulty: MakeFaulty, tokenizer: Tokenizer) -> None:
    long = "x" * 21
    translator, runner = make_faulty()
    runner.max_tokens_that_fit = len(tokenizer.encode(long, "eng_Latn")) - 1
    for name, text in (("long", long), ("short", "on"), ("also short", "an")):
        translator.submit(request(name, text))
    ended = drain(translator)
    assert ended["long"].error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert ended["short"].ok
    assert ended["also short"].ok


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_faults(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_torchs_own_refusal_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
