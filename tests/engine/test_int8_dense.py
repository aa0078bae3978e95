"""`int8_dense`: the engine against a plain emulation of what it is to compute, and what the option costs in quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import engine.model.layers
from engine.bench.check import token_agreement
from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine, engine_config
from engine.bench.random_model import RandomWeights, random_transformer
from engine.bench.shapes import SHAPES, Cell, Variant
from engine.config import EngineConfig
from engine.demo.evaluation import directions_of, read_heldout
from engine.device_runner import DeviceRunner
from engine.kv_cache import KVCache
from engine.model import kernel_layers
from engine.model.transformer import Transformer
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import Int32Array, SearchOptions, Translation
from engine.weights.loading import load_transformer
from tests.engine.int8_emulation import Int8Dense, emulate
from tests.engine.test_device_runner import CONFIG, DEVICES, SEARCHES, SHAPE, kernel_translator, requests, run
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import write_tiny_tokenizer

DEMO = Path("engine/demo/checkpoint")
# float32 activations: what is left to differ is int8 rounding of values that two float32 sums put on two sides of a half
INT8 = replace(CONFIG, precision="w4a16", activation_dtype="float32", int8_dense=True)

SHORT = [SearchOptions(beam_size=1, max_target_tokens=4), SearchOptions(beam_size=2, max_target_tokens=4)]  # interpreted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("int8_dense"))
    return make_tiny_checkpoint(directory, seed=5, eos_bias=3.0, **SHAPE)


def emulated(checkpoint: Path, options: Int8Dense, monkeypatch: pytest.MonkeyPatch) -> Translator:
    config = replace(INT8, device="cpu")
    monkeypatch.setattr(engine.model.layers, "can_pack", lambda dtype, device: False)
    model = emulate(load_transformer(checkpoint, config), options)
    return Translator(Tokenizer.from_checkpoint(checkpoint), Scheduler(config), Runner(model, config), config)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows_from", [1, 1000])
def test_the_engine_computes_what_the_emulation_does(
    checkpoint: Path, device: str, rows_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_layers, "INT8_ROWS_FROM", rows_from)
    work = requests(60, SEARCHES) if device == "cuda" else requests(2, SHORT)
    truth = run(emulated(checkpoint, Int8Dense(rows_int8=rows_from == 1), monkeypatch), work, at_once=2)
    ours = run(kernel_translator(checkpoint, replace(INT8, device=device), monkeypatch), work, at_once=2)
    assert_close(ours, truth)


def test_invariant_mode_gives_the_same_bits_alone_and_together(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(INT8, batch_invariant=True)
    translator = kernel_translator(checkpoint, config, monkeypatch)
    work = requests(2, SHORT[1:])
    together = run(translator, work, at_once=2)
    alone = run(translator, work[1:2], at_once=1)
    assert [h.score for h in alone["1"].hypotheses] == [h.score for h in together["1"].hypotheses]


def assert_close(ours: dict[str, Translation], truth: dict[str, Translation]) -> None:
    """Two float32 sums may put a value on two sides of a half and its code one apart: rare, and worth a hundredth in a
    score; a map in another form moves every score by thousandths."""
    assert ours.keys() == truth.keys()
    errors = []
    for name, expected in truth.items():
        assert ours[name].error is None
        both = list(zip(ours[name].hypotheses, expected.hypotheses, strict=True))
        if all(a.target_token_ids == b.target_token_ids for a, b in both):
            errors.append(max(abs(a.score - b.score) for a, b in both))
    assert len(errors) >= 0.9 * len(truth)
    assert max(errors) < 0.02
    assert sorted(errors)[len(errors) // 3] < 1e-5


GATE_NATS = 0.005  # a token: int4 experts cost 0.011 and 0.13 chrF (LOG.md), so this is about 0.06 of the 0.1 allowed


@torch.inference_mode()
def forced(model: Transformer, texts: list[tuple[Int32Array, Int32Array]]) -> tuple[float, Tensor]:
    """Teacher-forced over (source ids, target ids): mean negative log-probability of a target token that the model chooses,
    and all log-probabilities [tokens, V]. The model reads the start token, then the target up to its last token."""
    sources, targets = zip(*texts, strict=True)
    lengths = torch.tensor([len(target) for target in targets])
    cache = KVCache.allocate(
        model.config,
        num_rows=len(texts),
        max_target_tokens=int(lengths.max()) + 1,
        num_source_slots=len(texts),
        max_source_tokens=max(len(source) for source in sources),
        dtype=model.dtype,
        device=torch.device("cpu"),
    )
    offsets = torch.tensor([0, *(len(source) for source in sources)]).cumsum(0)
    memory = model.encode(torch.from_numpy(np.concatenate(sources)).long(), offsets)
    model.write_cross_kv(memory, offsets, torch.arange(len(texts)), cache)
    fed = torch.nn.utils.rnn.pad_sequence([torch.tensor([2, *target]) for target in targets], batch_first=True)
    losses, logprobs = [], []
    for position in range(int(lengths.max())):
        rows = torch.nonzero(lengths > position)[:, 0]
        ancestry = rows[:, None].repeat(1, fed.shape[1])
        at = torch.full_like(rows, position)
        logits = model.decode(fed[rows, position], at, rows, rows, ancestry, cache)
        if position > 0:  # the first target token is the language, which no one chooses
            logprobs.append(logits.log_softmax(dim=1))
            losses.append(-logprobs[-1].gather(1, fed[rows, position + 1, None])[:, 0])
    return torch.cat(losses).mean().item(), torch.cat(logprobs)


def test_int8_rows_stay_within_the_quality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model on held-out references: chrF of so few texts is noise (half a point), log-probabilities are not.

    float32 activations, so that nothing but the option differs between the two."""
    monkeypatch.setattr(engine.model.layers, "can_pack", lambda dtype, device: False)
    config = EngineConfig(precision="w4a16", activation_dtype="float32")
    tokenizer, model = Tokenizer.from_checkpoint(DEMO), load_transformer(DEMO, config)
    texts = []
    groups = [group["texts"] for group in read_heldout() if group["kind"] == "interface"]
    for index, (source, target) in enumerate(directions_of(tokenizer.languages, pivot_only=True)):
        both = [group for group in groups if source in group and target in group][index : index + 4]
        texts += [(tokenizer.encode(t[source], source), tokenizer.encode(t[target], target)) for t in both]
    assert len(texts) == 120
    plain, truth = forced(model, texts)
    int8, logprobs = forced(emulate(model, Int8Dense()), texts)
    divergence = (truth.exp() * (truth - logprobs)).sum(dim=1).mean().item()
    assert int8 - plain < GATE_NATS
    assert divergence < 0.003
    coarse, _ = forced(emulate(model, Int8Dense(largest_code=7)), texts)
    assert coarse - plain > GATE_NATS  # the measure sees what is too coarse: the same with 15 levels instead of 255


@pytest.mark.gpu
@pytest.mark.parametrize("cell", [Cell(320, 1), Cell(80, 4)])
def test_320_rows_at_the_papers_widths_and_over_poisoned_caches(cell: Cell, report_figure: Callable[[str], None]) -> None:
    """bf16, tiles as measured: the engine is as near to the emulation as the engine without the option to the plain path,
    and what the caches held before reaches no result."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    weights = RandomWeights(replace(SHAPES["paper"], encoder_layers=2, decoder_layers=2), torch.device("cuda"))
    inputs = replace(CellInputs.draw(weights.config, cell), target_tokens=10)
    errors, agreements = [], []
    for int8 in (False, True):
        config = engine_config(
            [cell],
            device="cuda",
            variant=Variant("w4a16", int8_dense=int8),
            source_tokens=inputs.source_token_ids.shape[1],
            target_tokens=inputs.target_tokens,
            num_threads=1,
        )
        model = random_transformer(weights, config)
        truth = OurEngine(Runner(emulate(model, Int8Dense()) if int8 else model, config), config).run(inputs)
        runner = DeviceRunner(model, config)
        engine = OurEngine(runner, config)
        first = engine.run(inputs)
        for poison in (float("nan"), 50.0):
            runner._cache.self_kv.fill_(poison)
            runner._cache.cross_kv.fill_(poison)
            again = engine.run(inputs)
            assert (again.token_ids == first.token_ids).all()
            assert again.scores == first.scores
        errors.append(float(np.abs(np.subtract(first.scores, truth.scores)).mean()))
        agreements.append(token_agreement(first.token_ids, truth.token_ids))
    report_figure(f"{cell}: score error {errors[0]:.4f} without, {errors[1]:.4f} in int8; equal tokens {agreements}")
    assert errors[1] < 1.5 * errors[0] + 0.005
    assert agreements[1] > agreements[0] - 0.05
