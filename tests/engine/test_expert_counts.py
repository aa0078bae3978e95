"""Counting changes no translation and counts every row of every step, as a list of all routing decisions says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from engine import demo
from engine.config import EngineConfig, ModelConfig
from engine.expert_counts import count_experts
from engine.model.mixture_of_experts import Router
from engine.translator import Translator
from engine.types import SearchOptions
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import random_texts, write_tiny_tokenizer

CHECKPOINT = Path(demo.__file__).parent / "checkpoint"
CONFIG = EngineConfig(device="cpu", precision="w8a16")
TEXTS = {
    ("eng_Latn", "deu_Latn"): ["Save", "The file could not be saved because the disk is full.", "Page {n}"],
    ("deu_Latn", "jpn_Jpan"): ["Speichern"],
    ("eng_Latn", "kor_Hang"): ["Choose a folder for the backup"] * 2,
}


def test_one_expert_a_token_is_counted_once(tmp_path: Path) -> None:
    switch = make_tiny_checkpoint(write_tiny_tokenizer(tmp_path), seed=3, eos_bias=4.0, num_experts_per_tok=1)
    texts = random_texts(5, seed=1, max_words=4)
    config, search = EngineConfig(precision="fp32"), SearchOptions(beam_size=2, max_target_tokens=9)
    translator = Translator.load(switch, config)
    translator.translate(texts, src_lang="eng_Latn", tgt_lang="fra_Latn", search=search)
    rows = translator.stats().num_decoded_rows + len(texts)  # the start token of a sentence is a row beside its first
    ((_, layers, counts),) = count_experts(switch, {("eng_Latn", "fra_Latn"): texts}, config, search)
    assert layers == (1,)
    assert counts.sum(1).tolist() == [rows]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_every_row_is_counted_once_and_translations_stay(beam_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    search = SearchOptions(beam_size=beam_size)
    translator = Translator.load(CHECKPOINT, CONFIG)
    expected, rows = {}, {}
    for pair, texts in TEXTS.items():
        before = translator.stats().num_decoded_rows
        expected[pair] = [t.text for t in translator.translate(texts, src_lang=pair[0], tgt_lang=pair[1], search=search)]
        rows[pair] = translator.stats().num_decoded_rows - before

    said: list[list[list[int]]] = []  # every router's answer, in the order of the calls
    plain = Router.__call__

    def listening(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = plain(self, x)
        said.append(ids.tolist())
        return ids, gates

    seen: dict[tuple[str, str], list[str]] = {}
    translate = Translator.translate

    def watched(self: Translator, texts: list[str], **options: str) -> list[object]:
        found = translate(self, texts, **options)  # type: ignore[arg-type]
        seen[options["src_lang"], options["tgt_lang"]] = [each.text for each in found]
        return list(found)

    monkeypatch.setattr(Router, "__call__", listening)
    monkeypatch.setattr(Translator, "translate", watched)
    config = ModelConfig.from_checkpoint(CHECKPOINT)
    sparse = {
        stack: [i for i in range(getattr(config, f"{stack}_layers")) if config.is_sparse(stack, i)]  # type: ignore[arg-type]
        for stack in ("encoder", "decoder")
    }
    for pair, layers, counts in count_experts(CHECKPOINT, TEXTS, CONFIG, search):
        assert list(layers) == sparse["decoder"]
        assert counts.shape == (len(layers), config.num_experts)
        for total in counts.sum(1).tolist():  # the start token of a sentence is a row beside its first
            assert total // 2 - rows[pair] == len(TEXTS[pair])
        decoding = said[len(sparse["encoder"]) :]  # one encoder pass holds all texts of a pair
        for place, row in enumerate(counts.tolist()):
            tally = Counter(expert for answer in decoding[place :: len(layers)] for two in answer for expert in two)
            assert row == [tally[expert] for expert in range(config.num_experts)]
        said.clear()
    assert seen == expected
