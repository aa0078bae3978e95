"""The kernel path against the plain one: the same texts, ids and scores. Here in Triton's interpreter, on a GPU captured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.model.layers
import engine.quantization.cpu_experts
from engine.config import EngineConfig, ModelConfig
from engine.device_runner import DeviceRunner, size_buckets, supports_kernels
from engine.model import kernel_decoder
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import SearchOptions, Translation, TranslationRequest
from engine.weights.loading import load_transformer
from kernels.history_lists import SEEN_BY, HistoryLists
from tests.engine.tiny import load_hf_model, make_tiny_checkpoint
from tests.engine.tiny_tokenizer import TINY_LANGUAGES, random_texts, write_tiny_tokenizer

# Head size 16, the least the attention kernels take; a vocabulary that is no multiple of 64; a last layer with experts.
SHAPE = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 71, "num_experts": 5}
SEARCHES = [
    SearchOptions(beam_size=1, max_target_tokens=8),
    SearchOptions(beam_size=4, max_target_tokens=7, num_hypotheses=3),
    SearchOptions(beam_size=2, max_target_tokens=9, min_target_tokens=4),
    SearchOptions(beam_size=3, max_target_tokens=6, early_stopping=True, length_penalty=0.6),
]
NGRAM_SEARCHES = [
    SearchOptions(beam_size=1, max_target_tokens=8, no_repeat_ngram_size=2),
    SearchOptions(beam_size=5, max_target_tokens=7, early_stopping="never", no_repeat_ngram_size=3, min_target_tokens=3),
]
CONFIG = EngineConfig(
    precision="fp32",
    max_rows=12,
    max_source_slots=5,
    max_target_tokens=12,
    max_source_tokens=32,
    encode_token_budget=64,
    max_waiting=64,
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("device_runner"))
    return make_tiny_checkpoint(directory, seed=5, eos_bias=3.0, **SHAPE)


@pytest.fixture(scope="module")
def switch_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert a token."""
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("device_runner_switch"))
    return make_tiny_checkpoint(directory, seed=7, eos_bias=3.0, **SHAPE, num_experts_per_tok=1)


@pytest.fixture(scope="module")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output projection of its own."""
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("device_runner_untied"))
    return make_tiny_checkpoint(directory, seed=8, eos_bias=3.0, **SHAPE, tie_word_embeddings=False)


def kernel_translator(checkpoint: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Translator:
    """Through the kernels on any device; on the CPU the weights must not be in the layout of the plain path's library."""
    if config.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if config.device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    monkeypatch.setattr(engine.model.layers, "can_pack", lambda dtype, device: False)
    monkeypatch.setattr(engine.quantization.cpu_experts, "can_pack", lambda dtype, device: False)
    runner = DeviceRunner(load_transformer(checkpoint, config), config)
    return Translator(Tokenizer.from_checkpoint(checkpoint), Scheduler(config), runner, config)


def plain_translator(checkpoint: Path, config: EngineConfig) -> Translator:
    runner = Runner.load(checkpoint, config)
    return Translator(Tokenizer.from_checkpoint(checkpoint), Scheduler(config), runner, config)


def requests(count: int, searches: list[SearchOptions]) -> list[TranslationRequest]:
    texts = random_texts(count, seed=3, max_words=4)
    return [
        TranslationRequest(str(i), text, TINY_LANGUAGES[i % 3], TINY_LANGUAGES[(i + 1) % 3], searches[i % len(searches)])
        for i, text in enumerate(texts)
    ]


def run(translator: Translator, work: list[TranslationRequest], *, at_once: int) -> dict[str, Translation]:
    """A stream: `at_once` more sentences arrive before every step."""
    ended: dict[str, Translation] = {}
    waiting = list(work)
    for _ in range(400):
        for request in waiting[:at_once]:
            translator.submit(request)
        del waiting[:at_once]
        ended.update((translation.request_id, translation) for translation in translator.step())
        if not waiting and not translator.has_work:
            return ended
    raise AssertionError("the engine does not come to an end")


def assert_same(ours: dict[str, Translation], truth: dict[str, Translation], ties: frozenset[str] = frozenset()) -> None:
    """ties: sentences that two right implementations may translate differently."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        assert ours[name].error is None
        if name in ties:
            continue
        assert [h.target_token_ids for h in ours[name].hypotheses] == [h.target_token_ids for h in expected.hypotheses]
        scores = [h.score for h in ours[name].hypotheses]
        assert scores == pytest.approx([h.score for h in expected.hypotheses], rel=1e-4, abs=1e-4)


def greedy_ties(checkpoint: Path, work: list[TranslationRequest], truth: dict[str, Translation]) -> frozenset[str]:
    """Greedy sentences where at some step the two best logits are closer than fp32 sums in another order may move them
    (sentence 44 of these: 7e-7 apart)."""
    oracle, tokenizer = load_hf_model(checkpoint), Tokenizer.from_checkpoint(checkpoint)
    found = set()
    for request in work:
        if request.search.beam_size > 1:
            continue
        source = torch.from_numpy(tokenizer.encode(request.source_text, request.src_lang)).long()[None]
        target = torch.tensor([[2, *truth[request.request_id].hypotheses[0].target_token_ids]])
        with torch.inference_mode():
            logits = oracle(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target).logits
        best = logits[0, 1:-1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() < 1e-5:
            found.add(request.request_id)
    return frozenset(found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("precision", "model"),
    [("fp32", "checkpoint"), ("w4a16", "checkpoint"), ("w4a16", "switch_checkpoint"), ("fp32", "untied_checkpoint")],
)
def test_same_results_as_the_plain_path(
    device: str, precision: str, model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint: Path = request.getfixturevalue(model)
    config = dataclasses.replace(CONFIG, precision=precision, activation_dtype="float32", device=device)
    work = requests(60 if device == "cuda" else 6 if precision == "fp32" else 3, SEARCHES)
    truth = run(plain_translator(checkpoint, dataclasses.replace(config, device="cpu")), work, at_once=3)
    ties = greedy_ties(checkpoint, work, truth)
    assert len(ties) <= 2
    translator = kernel_translator(checkpoint, config, monkeypatch)
    assert_same(run(translator, work, at_once=3), truth, ties)
    if device == "cuda":
        assert_same(run(translator, work, at_once=60), truth, ties)  # the same graphs again, another composition


def attend_through_lists(q: torch.Tensor, cells: torch.Tensor, lists: HistoryLists, num_heads: int) -> torch.Tensor:
    """Self-attention as the kernel that takes lists finds cells, entry by entry; NaN for entries of no group."""
    keys, values = cells.flatten(0, 1).double().unbind(1)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    for (start, count, size, _), words in zip(lists.groups[: int(lists.in_use)].tolist(), lists.words, strict=False):
        for entry in range(count):
            seen = words[:size][words[:size] >> (SEEN_BY + entry) & 1 == 1] & ((1 << SEEN_BY) - 1)
            query = q[start + entry].double().view(num_heads, -1)
            weights = torch.softmax(torch.einsum("hd,thd->ht", query, keys[seen]) / query.shape[1] ** 0.5, 1)
            out[start + entry] = torch.einsum("ht,thd->hd", weights, values[seen]).flatten().to(q.dtype)
    return out


def test_large_steps_attend_through_the_lists_of_their_own_histories(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that takes lists is for Hopper; here a slow twin stands for it, and the interpreter makes the lists."""
    sizes = set()
    plain = kernel_decoder.decode_self_attention

    def attend(q: torch.Tensor, cells: torch.Tensor, *operands: torch.Tensor, **options: Any) -> torch.Tensor:
        lists = options.pop("lists")
        sizes.add((len(q), lists is not None))
        if lists is None:
            return plain(q, cells, *operands, **options)
        assert len(lists.groups) == len(q)
        return attend_through_lists(q, cells, lists, options["num_heads"])

    monkeypatch.setattr(kernel_decoder, "decode_self_attention", attend)
    monkeypatch.setattr(kernel_decoder, "lists_from", lambda *about: 8)
    work = requests(5, SEARCHES)
    truth = run(plain_translator(checkpoint, CONFIG), work, at_once=3)
    ended = run(kernel_translator(checkpoint, CONFIG, monkeypatch), work, at_once=3)
    assert_same(ended, truth, greedy_ties(checkpoint, work, truth))
    assert {listed for size, listed in sizes if size < 8} == {False}
    assert {listed for size, listed in sizes if size >= 8} == {True}


@pytest.mark.parametrize("device", DEVICES)
def test_ngram_rules(checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = requests(2 if device == "cpu" else 40, NGRAM_SEARCHES)
    truth = run(plain_translator(checkpoint, CONFIG), work, at_once=2)
    config = dataclasses.replace(CONFIG, device=device)
    assert_same(run(kernel_translator(checkpoint, config, monkeypatch), work, at_once=2), truth)


@pytest.mark.parametrize("device", DEVICES)
def test_cancelled_sentences_leave_nothing(checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = requests(4, SEARCHES[:2])
    truth = run(plain_translator(checkpoint, CONFIG), work[2:], at_once=2)
    translator = kernel_translator(checkpoint, dataclasses.replace(CONFIG, device=device), monkeypatch)
    for request in work[:2]:
        translator.submit(request)
    translator.step()
    translator.step()
    assert all(translator.cancel(request.request_id) for request in work[:2])
    ended = run(translator, work[2:], at_once=2)
    assert_same({name: t for name, t in ended.items() if int(name) >= 2}, truth)
    assert translator.stats().num_live_rows == 0


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [float("nan"), 50.0])
def test_a_new_sentence_reads_nothing_of_those_before(
    checkpoint: Path, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first step a sentence's beams attend to its start token, whose cell that same step writes."""
    translator = kernel_translator(checkpoint, dataclasses.replace(CONFIG, device="cuda"), monkeypatch)
    work = requests(12, SEARCHES[:2])
    truth = run(translator, work, at_once=2)
    for _ in range(10):
        translator._runner._cache.self_kv.fill_(poison)
        assert_same(run(translator, work, at_once=2), truth)


def test_invariant_mode_gives_the_same_bits_alone_and_together(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, batch_invariant=True)
    translator = kernel_translator(checkpoint, config, monkeypatch)
    work = requests(2, SEARCHES[:2])
    together = run(translator, work, at_once=2)
    alone = run(translator, work[1:2], at_once=1)
    assert [h.score for h in alone["1"].hypotheses] == [h.score for h in together["1"].hypotheses]


def test_unsupported_heads_are_known() -> None:
    raw = {"vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    raw |= {"encoder_sparse_step": 0, "decoder_sparse_step": 0, "num_experts": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    assert supports_kernels(ModelConfig.from_dict(raw | heads | {"d_model": 64}))
    assert not supports_kernels(ModelConfig.from_dict(raw | heads | {"d_model": 36}))


def test_size_buckets_end_with_what_is_asked_for() -> None:
    assert size_buckets(7) == (1, 2, 3, 4, 7)
    assert size_buckets(20)[-1] == 32
    assert size_buckets(600)[-3:] == (448, 512, 608)
    assert size_buckets(2048, smallest=16)[0] == 16
