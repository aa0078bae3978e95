"""A real CUDA out of memory in a live engine: another program takes the card's memory from the driver while it works.

What fits goes on, a pass that does not is split, a sentence too long for what is left fails alone with torch's error, and
once there is room again the same engine gives the same answers. test_faults.py has the same with made-up errors.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.device_memory import release_cached_memory
from engine.device_runner import DeviceRunner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import FinishReason, SearchOptions, Translation, TranslationRequest
from engine.weights.loading import load_transformer
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import random_texts, write_tiny_tokenizer

pytestmark = pytest.mark.gpu

_MIB = 1 << 20
# Hidden values of experts, in one piece: 256 MiB for an encoder pass of 2,048 tokens, 16 MiB for one long sentence, 2 MiB
# for a short one.
SHAPE = {
    "d_model": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 64,
    "num_experts": 5,
    "encoder_ffn_dim": 16384,
    "max_position_embeddings": 192,
}
CONFIG = EngineConfig(
    precision="fp32",
    device="cuda",
    max_rows=16,
    max_source_slots=16,
    max_target_tokens=40,
    max_source_tokens=128,
    encode_token_budget=2048,
    max_waiting=64,
    batch_invariant=True,  # company must not change an answer, so that answers can be compared
)
LASTING = SearchOptions(beam_size=1, max_target_tokens=40, min_target_tokens=40)
WITH_NGRAMS = SearchOptions(beam_size=1, max_target_tokens=40, min_target_tokens=40, no_repeat_ngram_size=2)
SHORT = [text[:9] for text in random_texts(24, seed=21, max_words=3)]
LONG = ["".join(random_texts(60, seed=seed, max_words=4)).replace(" ", "")[:120] for seed in range(16)]
Ids = tuple[int, ...]


class OtherProgram:
    """Takes memory from the driver, as another program on the card would: torch cannot give it back."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._held: list[ctypes.c_uint64] = []

    def take_all_but(self, num_bytes: int) -> None:
        """Leave at most this much. What torch keeps unused is given back to the driver first."""
        torch.cuda.synchronize()
        release_cached_memory()
        rest = chunk = torch.cuda.mem_get_info()[0] - num_bytes
        while chunk >= _MIB and rest > 0:
            pointer = ctypes.c_uint64()
            if self._driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(min(chunk, rest))) == 0:
                self._held.append(pointer)
                rest -= min(chunk, rest)
            else:
                chunk //= 2

    def leave(self) -> None:
        """Free everything."""
        while self._held:
            assert self._driver.cuMemFree_v2(self._held.pop()) == 0


@pytest.fixture
def other_program() -> Iterator[OtherProgram]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    gc.collect()
    program = OtherProgram()
    yield program
    program.leave()
    release_cached_memory()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(write_tiny_tokenizer(tmp_path_factory.mktemp("out_of_memory")), seed=7, **SHAPE)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> dict[str, Ids]:
    """Ids of every text from an engine with the card to itself; it has compiled what the others launch."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return {text: ids(translation) for text, translation in run(engine(checkpoint), [*SHORT, *LONG]).items()}


def engine(checkpoint: Path) -> Translator:
    """Nothing is captured yet: every size of pass asks for memory when it first comes."""
    runner = DeviceRunner(load_transformer(checkpoint, CONFIG), CONFIG)
    return Translator(Tokenizer.from_checkpoint(checkpoint), Scheduler(CONFIG), runner, CONFIG)


def warm_up(translator: Translator) -> None:
    """Capture decode steps of all sizes that come up here, and encoder passes of one and two short sentences."""
    run(translator, SHORT[:1])
    for i in range(0, 16, 2):
        submit(translator, SHORT[i : i + 2])
        assert translator.step() == []
    drain(translator)


def submit(translator: Translator, texts: list[str], search: SearchOptions = LASTING) -> None:
    for text in texts:
        translator.submit(TranslationRequest(text, text, "eng_Latn", "fra_Latn", search))


def run(translator: Translator, texts: list[str]) -> dict[str, Translation]:
    submit(translator, texts)
    return drain(translator)


def drain(translator: Translator) -> dict[str, Translation]:
    ended: dict[str, Translation] = {}
    for _ in range(4000):
        if not translator.has_work:
            break
        for translation in translator.step():
            assert translation.request_id not in ended
            ended[translation.request_id] = translation
    stats = translator.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_live_rows) == (0, 0, 0)
    return ended


def ids(translation: Translation) -> Ids:
    assert translation.error is None, translation.error
    return translation.hypotheses[0].target_token_ids


def is_out_of_memory(translation: Translation) -> bool:
    return translation.finish_reason is FinishReason.ERROR and "out of memory" in str(translation.error)


def test_who_runs_goes_on_and_who_is_too_long_fails_alone(
    checkpoint: Path, undisturbed: dict[str, Ids], other_program: OtherProgram
) -> None:
    """Eight sentences run, with all that they need captured; then the card is full, and six short and two long ones come.
    Together they need more than there is room for, so the pass is split down to what is captured: one or two short ones."""
    translator = engine(checkpoint)
    warm_up(translator)
    submit(translator, SHORT[:8])
    for _ in range(5):
        assert translator.step() == []
    other_program.take_all_but(0)
    submit(translator, [*SHORT[8:12], LONG[0], *SHORT[12:14], LONG[1]])
    ended = drain(translator)
    assert ended.keys() == {*SHORT[:14], LONG[0], LONG[1]}
    assert {text: ids(ended[text]) for text in SHORT[:14]} == {text: undisturbed[text] for text in SHORT[:14]}
    assert is_out_of_memory(ended[LONG[0]])
    assert is_out_of_memory(ended[LONG[1]])
    other_program.leave()
    assert {text: ids(translation) for text, translation in run(translator, LONG).items()} == {
        text: undisturbed[text] for text in LONG
    }
    assert translator.stats().num_faults_in_a_row == 0


def test_a_step_that_cannot_be_captured_costs_those_that_need_it_alone(
    checkpoint: Path, undisturbed: dict[str, Ids], other_program: OtherProgram
) -> None:
    """Two sentences with a rule that no step was captured for yet, among six that run: these start over and finish."""
    translator = engine(checkpoint)
    warm_up(translator)
    submit(translator, SHORT[:6])
    for _ in range(5):
        assert translator.step() == []
    other_program.take_all_but(0)
    submit(translator, SHORT[6:8], WITH_NGRAMS)
    ended = drain(translator)
    assert ended.keys() == set(SHORT[:8])
    assert {text: ids(ended[text]) for text in SHORT[:6]} == {text: undisturbed[text] for text in SHORT[:6]}
    assert all(is_out_of_memory(ended[text]) for text in SHORT[6:8])
    assert translator.stats().num_retries > 0
    other_program.leave()
    submit(translator, SHORT[6:8], WITH_NGRAMS)
    submit(translator, SHORT[:6])
    ended = drain(translator)
    assert {text: ids(ended[text]) for text in SHORT[:6]} == {text: undisturbed[text] for text in SHORT[:6]}
    for text in SHORT[6:8]:
        pairs = list(itertools.pairwise(ids(ended[text])))
        assert len(set(pairs)) == len(pairs) == 39


def test_a_pass_too_large_for_what_is_left_is_halved(
    checkpoint: Path, undisturbed: dict[str, Ids], other_program: OtherProgram, caplog: pytest.LogCaptureFixture
) -> None:
    """There is room for three fifths of what a pass of all sixteen needs."""
    translator = engine(checkpoint)
    warm_up(translator)
    run(translator, LONG[:1])
    held = torch.cuda.memory_reserved()
    assert run(engine(checkpoint), LONG).keys() == set(LONG)
    torch.cuda.synchronize()
    needed = torch.cuda.memory_reserved() - held
    gc.collect()
    other_program.take_all_but(needed * 3 // 5)
    with caplog.at_level(logging.WARNING, logger="engine.translator"):
        ended = run(translator, LONG)
    assert "no memory for an encoder pass of 16 sentences" in caplog.text
    assert {text: ids(translation) for text, translation in ended.items()} == {text: undisturbed[text] for text in LONG}
    assert translator.stats().num_retries == 0
    other_program.leave()
    caplog.clear()
    assert {text: ids(translation) for text, translation in run(translator, LONG).items()} == {
        text: undisturbed[text] for text in LONG
    }
    assert "no memory" not in caplog.text  # whole again


def test_a_card_with_nothing_left_ends_sentences_with_a_reason_and_not_the_engine(
    checkpoint: Path, undisturbed: dict[str, Ids], other_program: OtherProgram
) -> None:
    """Nothing is captured yet when the memory goes, so nothing can be: each sentence gets torch's error, none is lost."""
    translator = engine(checkpoint)
    other_program.take_all_but(0)
    ended = run(translator, [*SHORT[:6], *LONG[:6]])
    assert ended.keys() == {*SHORT[:6], *LONG[:6]}
    failed = {text for text, translation in ended.items() if not translation.ok}
    assert failed >= set(LONG[:6])
    assert all(is_out_of_memory(ended[text]) for text in failed)
    assert all(ids(ended[text]) == undisturbed[text] for text in ended.keys() - failed)
    other_program.leave()
    texts = [*SHORT[:6], *LONG[:6]]
    assert {text: ids(t) for text, t in run(translator, texts).items()} == {text: undisturbed[text] for text in texts}
