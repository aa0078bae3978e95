"""Expert loads: the plain path's against choices recomputed in numpy, the kernel path's against the plain path's."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import engine.expert_load
import engine.model.layers
import engine.quantization.cpu_experts
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.expert_load import ExpertLoadMeter
from engine.model.mixture_of_experts import Router, StackLoad
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import ExpertLoad, SearchOptions, TranslationRequest
from engine.weights.loading import load_transformer
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import random_texts, write_tiny_tokenizer

SHAPE = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 71, "num_experts": 5}
EXPERTS = 5
CONFIG = EngineConfig(
    precision="fp32",
    max_rows=12,
    max_source_slots=5,
    max_target_tokens=12,
    max_source_tokens=32,
    encode_token_budget=64,
    max_waiting=64,
)
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Counts = NDArray[np.int64]  # [passes, layers, experts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("expert_load"))
    return make_tiny_checkpoint(directory, seed=5, eos_bias=3.0, **SHAPE)


def with_runner(checkpoint: Path, runner: Runner | DeviceRunner, config: EngineConfig) -> Translator:
    return Translator(Tokenizer.from_checkpoint(checkpoint), Scheduler(config), runner, config)


def requests(count: int, search: SearchOptions) -> list[TranslationRequest]:
    texts = random_texts(count, seed=8, max_words=4)
    return [TranslationRequest(str(i), text, "eng_Latn", "fra_Latn", search) for i, text in enumerate(texts)]


def run(translator: Translator, work: list[TranslationRequest]) -> None:
    for request in work:
        translator.submit(request)
    while translator.has_work:
        assert all(translation.error is None for translation in translator.step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # every copy arrives before the next is due


def keep_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the kernels nor numpy can read the layout of the plain path's library."""
    monkeypatch.setattr(engine.model.layers, "can_pack", lambda dtype, device: False)
    monkeypatch.setattr(engine.quantization.cpu_experts, "can_pack", lambda dtype, device: False)


def expected(stage: Any, layers: tuple[int, ...], counts: Counts) -> ExpertLoad:
    """By hand, as long as all passes are recent."""
    total = counts.sum(axis=0)
    return ExpertLoad(
        stage=stage,
        layers=layers,
        num_passes=len(counts),
        num_tokens=tuple(total.sum(axis=1).tolist()),
        num_active=tuple((counts > 0).sum(axis=(0, 2)).tolist()),
        skew=tuple(float(row.max()) / float(row.mean()) for row in total),
        busiest_share=tuple(float(row.max() / row.sum()) for row in total),
    )


def assert_close(ours: ExpertLoad, truth: ExpertLoad) -> None:
    for field in ("stage", "layers", "num_passes", "num_tokens", "num_active"):
        assert getattr(ours, field) == getattr(truth, field), field
    assert ours.skew == pytest.approx(truth.skew)
    assert ours.busiest_share == pytest.approx(truth.busiest_share)


def choices(router: Router, x: Tensor) -> Counts:
    """int64[E] of one call, from the equations: the largest logits of every token."""
    classifier = router.classifier
    logits = x.double().numpy() @ classifier.weight.double().numpy().T
    if classifier.bias is not None:
        logits = logits + classifier.bias.double().numpy()
    return np.bincount(np.argsort(-logits, axis=1)[:, : router.top_k].ravel(), minlength=EXPERTS)


@pytest.mark.parametrize(("beam_size", "experts_per_token"), [(1, 2), (3, 2), (2, 1)])
def test_counts_are_those_of_the_routers_choices(
    beam_size: int, experts_per_token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_tiny_checkpoint(
        write_tiny_tokenizer(tmp_path), seed=5, eos_bias=3.0, **SHAPE, num_experts_per_tok=experts_per_token
    )
    seen: dict[int, list[Counts]] = defaultdict(list)
    num_tokens: dict[int, int] = defaultdict(int)
    call = Router.__call__

    def recorded(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        seen[id(router)].append(choices(router, x))
        num_tokens[id(router)] += len(x)
        return call(router, x)

    keep_plain_weights(monkeypatch)
    monkeypatch.setattr(Router, "__call__", recorded)
    monkeypatch.setattr(engine.expert_load, "_RECENT_TOKENS", 10**6)
    transformer = load_transformer(checkpoint, CONFIG)
    translator = with_runner(checkpoint, Runner(transformer, CONFIG), CONFIG)
    assert translator.stats().expert_loads == ()
    run(translator, requests(9, SearchOptions(beam_size=beam_size, max_target_tokens=9)))
    loads = translator.stats().expert_loads
    assert [load.stage for load in loads] == ["encode", "decode"]
    for load, stack in zip(loads, (transformer.encoder_layers, transformer.decoder_layers), strict=True):
        routers = {i: layer.feed_forward.router for i, layer in enumerate(stack) if hasattr(layer.feed_forward, "router")}
        assert len(routers) >= 1
        counts = np.stack([np.stack(seen[id(router)]) for router in routers.values()], axis=1)
        assert_close(load, expected(load.stage, tuple(routers), counts))
        assert load.num_tokens == tuple(experts_per_token * num_tokens[id(router)] for router in routers.values())
    stats = translator.stats()
    assert (loads[0].num_passes, loads[1].num_passes) == (stats.num_encode_passes, stats.num_decode_steps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beam_size", [1, 2])
def test_the_kernel_path_counts_as_the_plain_one(
    checkpoint: Path, beam_size: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five sentences in 12 rows and 64 packed tokens: padding in both, and rows that ended beside rows that run. In a
    first step the plain path runs beams that are alike, the kernel path one of them: they choose the same experts."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    monkeypatch.setattr(engine.expert_load, "_STEPS_A_SAMPLE", 1)
    work = requests(5, SearchOptions(beam_size=beam_size, max_target_tokens=6))
    plain = with_runner(checkpoint, Runner(load_transformer(checkpoint, CONFIG), CONFIG), CONFIG)
    run(plain, work)
    keep_plain_weights(monkeypatch)
    config = dataclasses.replace(CONFIG, device=device)
    ours = with_runner(checkpoint, DeviceRunner(load_transformer(checkpoint, config), config), config)
    run(ours, work)
    loads, truth = ours.stats().expert_loads, plain.stats().expert_loads
    assert [load.stage for load in loads] == ["encode", "decode"]
    assert_close(loads[0], truth[0])
    if beam_size == 1:
        assert_close(loads[1], truth[1])
        return
    alike = len(work) * (beam_size - 1) * 2  # two experts a token
    assert loads[1].num_tokens == tuple(tokens - alike for tokens in truth[1].num_tokens)
    assert (loads[1].num_passes, loads[1].num_active) == (truth[1].num_passes, truth[1].num_active)


def meter(decoder: StackLoad) -> ExpertLoadMeter:
    return ExpertLoadMeter(StackLoad.allocate((), 0, CPU), decoder)


def test_layers_write_rows_of_their_own() -> None:
    stack = StackLoad.allocate((1, 4), 37, CPU)
    stack.row(4).copy_(torch.arange(37))
    assert stack.row(1).sum() == 0
    assert stack.row(4).data_ptr() % 128 == stack.row(1).data_ptr() % 128
    with pytest.raises(ValueError, match="not in tuple"):
        stack.row(2)


def test_skew_is_of_the_recent_past_and_counts_are_of_all() -> None:
    """A router that was uneven and is not any more: within twice the window the skew forgets."""
    stack = StackLoad.allocate((3,), EXPERTS, CPU)
    meter_ = meter(stack)
    uneven, even = torch.tensor([90, 10, 0, 0, 0]), torch.full((EXPERTS,), 20)
    for _ in range(4):  # 64 tokens an expert are 320, so this is one window
        stack.row(3).copy_(uneven)
        meter_.decoded()
    assert meter_.loads[0].skew == pytest.approx([90 / 20])
    skews = []
    for _ in range(8):
        stack.row(3).copy_(even)
        meter_.decoded()
        skews.append(meter_.loads[0].skew[0])
    assert skews == sorted(skews, reverse=True)
    assert skews[3] > 1.5  # the window before counts until this one is full
    assert skews[4:] == [1.0] * 4
    load = meter_.loads[0]
    assert (load.num_passes, load.num_tokens, load.num_active) == (12, (1200,), (4 * 2 + 8 * 5,))


def test_passes_of_padding_do_not_count() -> None:
    stack = StackLoad.allocate((0, 1), EXPERTS, CPU)
    meter_ = meter(stack)
    meter_.decoded()
    assert meter_.loads == ()
    stack.tokens_per_expert[:, 2] = 7
    meter_.decoded()
    stack.tokens_per_expert.zero_()
    meter_.decoded()
    assert meter_.loads[0].num_passes == 1
    assert meter_.loads[0].busiest_share == (1.0, 1.0)


def test_a_model_without_sparse_layers_has_no_loads() -> None:
    meter_ = meter(StackLoad.allocate((), 8, CPU))
    meter_.encoded()
    meter_.decoded()
    assert meter_.loads == ()
