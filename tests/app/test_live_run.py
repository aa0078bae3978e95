"""Live runs under a clock, what is learnt beforehand, and predictions for a machine of changing pace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.clocks import CpuClock
from app.cost.continuous import Sentences, replay_engine
from app.live_run import Cell, Pace, learn_sentences, predict_latency, run_live
from engine.config import EngineConfig
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import SearchOptions
from tests.app.cost.test_continuous import profile
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3, eos_bias=4.0))


def test_live_latency_counts_from_the_intended_instant(checkpoint: Path) -> None:
    translator = Translator.load(checkpoint, EngineConfig(precision="fp32", max_rows=2))
    cell = Cell("eng_Latn", "fra_Latn", "short", 2)
    latency = run_live(translator, ["hello"] * 3, cell, np.array([0.0, 0.0, 500.0]), CpuClock())
    assert np.isfinite(latency).all()
    assert latency[1] > latency[0]  # one sentence's beams fill the engine
    assert latency[2] < 100  # the idle time before it is not its own


def test_turns_do_not_count_in_a_live_run(checkpoint: Path) -> None:
    translator = Translator.load(checkpoint, EngineConfig(precision="fp32", max_rows=2))
    cell = Cell("eng_Latn", "fra_Latn", "short", 2)
    turns = []

    clock = CpuClock()

    def turn(run_s: float) -> None:
        turns.append(run_s)
        clock.wait(1000.0)

    latency = run_live(translator, ["hello"] * 3, cell, np.array([0.0, 5.0, 10.0]), clock, turn)
    assert len(turns) >= 3
    assert turns[0] < 0.1
    assert turns == sorted(turns)
    assert turns[-1] < 100
    assert latency.max() < 100
    assert clock.now() > 1000


def test_steps_learnt_together_are_those_of_each_alone(checkpoint: Path) -> None:
    config = EngineConfig(precision="fp32", max_rows=8, max_source_slots=3)
    translator = Translator.load(checkpoint, config)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    cell = Cell("eng_Latn", "fra_Latn", "short", 2)
    texts = ["hello", "hello world", "a", "the world", "hello hello hello"]
    learnt = learn_sentences(translator, tokenizer, config, cell, texts)
    for text, tokens, steps in zip(texts, learnt.source_tokens, learnt.steps, strict=True):
        before = translator.stats().num_decode_steps
        translator.translate([text], src_lang=cell.source, tgt_lang=cell.target, search=SearchOptions(beam_size=2))
        assert translator.stats().num_decode_steps - before == steps
        assert tokens == len(tokenizer.encode(text, cell.source))
    assert len(set(learnt.steps.tolist())) > 1


def test_a_machine_that_is_slow_for_a_while_is_in_the_prediction() -> None:
    """Half as fast between 10 and 20 s, by hand."""
    pace = Pace(np.array([0.0, 10.0, 10.0 + 1e-9, 20.0, 20.0 + 1e-9]), np.array([1.0, 1.0, 2.0, 2.0, 1.0]))
    np.testing.assert_allclose(pace.work_s(np.array([0.0, 4.0, 12.0, 20.0, 23.0])), [0, 4, 11, 15, 18], atol=1e-6)
    np.testing.assert_allclose(pace.instants(np.array([0.0, 4.0, 11.0, 15.0, 18.0])), [0, 4, 12, 20, 23], atol=1e-6)
    case, config = profile(beam_size=1, beta_s=0.0, gamma_s=0.0), EngineConfig(precision="w8a16", max_rows=8)
    sentences, arrival_s = Sentences(np.full(3, 5), np.full(3, 100)), np.array([1.0, 12.0, 30.0])
    alone = 0.01 + 5 * 0.001 + 100 * (0.02 + 0.003)
    np.testing.assert_allclose(replay_engine(case, config, sentences, arrival_s), alone)
    np.testing.assert_allclose(
        predict_latency(case, config, sentences, arrival_s, pace), [alone, 2 * alone, alone], atol=1e-6
    )
    steady = Pace(np.array([0.0]), np.array([1.0]))
    np.testing.assert_allclose(predict_latency(case, config, sentences, arrival_s, steady), alone)
