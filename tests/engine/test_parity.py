"""Our tokens against transformers' generate(), token for token, in fp32 on one thread; scores within 1e-4.

Texts go the whole way on our side (tokenizer, scheduler, runner, search), all languages and lengths mixed and more of them
than fit at once. The oracle gets its own tokenizer's ids in padded batches with an attention mask.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, NllbMoeForConditionalGeneration

import engine.demo
from engine.config import EngineConfig
from engine.translator import Translator
from engine.types import SearchOptions, TranslationRequest
from tests.engine.tiny import TINY_ODD, load_hf_model, make_tiny_checkpoint
from tests.engine.tiny_tokenizer import TINY_LANGUAGES, random_texts, write_tiny_tokenizer

DEMO = Path(engine.demo.__file__).parent / "checkpoint"
HELDOUT = DEMO.parent / "heldout.jsonl.gz"
ORACLE_BATCH = 40
TINY_CASES = [
    SearchOptions(beam_size=1, max_target_tokens=22),
    SearchOptions(beam_size=4, max_target_tokens=22),
    SearchOptions(beam_size=5, max_target_tokens=18, length_penalty=0.6),
    SearchOptions(beam_size=1, max_target_tokens=16, no_repeat_ngram_size=2, min_target_tokens=6),
    SearchOptions(beam_size=4, max_target_tokens=14, early_stopping=True, no_repeat_ngram_size=3),
    SearchOptions(beam_size=5, max_target_tokens=12, early_stopping="never", min_target_tokens=5, length_penalty=1.5),
    SearchOptions(beam_size=2, max_target_tokens=16, length_penalty=0.0, no_repeat_ngram_size=1),
    SearchOptions(beam_size=3, max_target_tokens=9, length_penalty=-0.5, min_target_tokens=3),
]
SWITCH_CASES = [TINY_CASES[0], TINY_CASES[1], TINY_CASES[5]]
DEMO_TARGETS = ("eng_Latn", "deu_Latn", "jpn_Jpan", "rus_Cyrl")  # few: the oracle takes one target language a batch
DEMO_CASES = [SearchOptions(beam_size=beam_size, max_target_tokens=48) for beam_size in (1, 4, 5)]
Sentence = tuple[str, str, str]  # text, src_lang, tgt_lang
Scored = tuple[tuple[int, ...], float]


@dataclass
class Tally:
    num_equal: int = 0
    num_sentences: int = 0


@pytest.fixture(scope="module")
def tally(report_figure: Callable[[str], None]) -> Iterator[Tally]:
    total = Tally()
    yield total
    report_figure(f"parity with transformers, fp32: {total.num_equal} of {total.num_sentences} translations equal")


@dataclass
class Pair:
    """A checkpoint in both engines, and what to translate with it."""

    translator: Translator
    oracle: NllbMoeForConditionalGeneration
    oracle_tokenizer: object
    sentences: list[Sentence]

    @classmethod
    def load(cls, checkpoint: Path, sentences: list[Sentence]) -> Pair:
        config = EngineConfig(precision="fp32", max_rows=50, max_source_slots=24, max_target_tokens=64)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # it pads what it encoded itself
        return cls(Translator.load(checkpoint, config), load_hf_model(checkpoint), tokenizer, sentences)

    def ours(self, search: SearchOptions) -> list[Scored]:
        ended = {}
        waiting = [TranslationRequest(str(i), *sentence, search) for i, sentence in enumerate(self.sentences)]
        while waiting or self.translator.has_work:
            for request in waiting[:7]:  # a few arrive between steps
                self.translator.submit(request)
            del waiting[:7]
            ended.update((translation.request_id, translation) for translation in self.translator.step())
        best = [ended[str(i)].hypotheses[0] for i in range(len(self.sentences))]
        return [(hypothesis.target_token_ids, hypothesis.score) for hypothesis in best]

    def theirs(self, search: SearchOptions) -> list[Scored]:
        results: list[Scored | None] = [None] * len(self.sentences)
        for tgt_lang in sorted({tgt_lang for _, _, tgt_lang in self.sentences}):
            places = [i for i, sentence in enumerate(self.sentences) if sentence[2] == tgt_lang]
            places.sort(key=lambda i: len(self.sentences[i][0]))
            for start in range(0, len(places), ORACLE_BATCH):
                batch = places[start : start + ORACLE_BATCH]
                for i, scored in zip(batch, self._generate([self.sentences[i] for i in batch], search), strict=True):
                    results[i] = scored
        return [scored for scored in results if scored is not None]

    def _generate(self, sentences: list[Sentence], search: SearchOptions) -> list[Scored]:
        tokenizer = self.oracle_tokenizer
        sources = []
        for text, src_lang, _ in sentences:
            tokenizer.src_lang = src_lang
            sources.append({"input_ids": tokenizer(text).input_ids})
        beam_options = {"length_penalty": search.length_penalty, "early_stopping": search.early_stopping}
        output = self.oracle.generate(
            **tokenizer.pad(sources, return_tensors="pt"),
            forced_bos_token_id=tokenizer.convert_tokens_to_ids(sentences[0][2]),
            num_beams=search.beam_size,
            max_new_tokens=search.max_target_tokens,
            min_new_tokens=search.min_target_tokens or None,
            no_repeat_ngram_size=search.no_repeat_ngram_size,
            **(beam_options if search.beam_size > 1 else {}),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=search.beam_size == 1,
        )
        rows = [tuple(row[1:]) for row in output.sequences.tolist()]
        if search.beam_size > 1:
            return list(zip(rows, output.sequences_scores.tolist(), strict=True))
        logprobs = torch.stack(output.logits, 1).log_softmax(-1).gather(2, output.sequences[:, 1:, None])[:, 1:, 0]
        scores = []
        for row, values in zip(rows, logprobs.tolist(), strict=True):
            length = row.index(2) + 1 if 2 in row else len(row)
            scores.append(sum(values[: length - 1]) / length**search.length_penalty)
        return list(zip(rows, scores, strict=True))


def check(pair: Pair, search: SearchOptions, tally: Tally) -> None:
    ours, theirs = pair.ours(search), pair.theirs(search)
    differences = []
    num_ends = 0
    for sentence, (ids, score), (oracle_row, oracle_score) in zip(pair.sentences, ours, theirs, strict=True):
        padding = (1,) * (len(oracle_row) - len(ids))
        num_ends += ids[-1] == 2
        if ids + padding != oracle_row or abs(score - oracle_score) > 1e-4:
            differences.append((sentence, ids, score, oracle_row, oracle_score))
    tally.num_sentences += len(ours)
    tally.num_equal += len(ours) - len(differences)
    print(f"parity: {len(ours) - len(differences)} of {len(ours)} sentences equal, {num_ends} end with eos; {search}")
    assert not differences
    eos_is_banned = search.no_repeat_ngram_size == 1  # the start token is an eos
    assert num_ends or eos_is_banned, "nothing ended with eos: this case would not notice a wrong end"


@pytest.fixture(scope="module", params=["even", "odd"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return tiny_pair(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny")), request.param)


@pytest.fixture(scope="module", params=["even", "odd"])
def switch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One expert a token; the oracle's router keeps its first choice."""
    return tiny_pair(write_tiny_tokenizer(tmp_path_factory.mktemp("switch")), request.param, num_experts_per_tok=1)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An output projection of its own."""
    return tiny_pair(write_tiny_tokenizer(tmp_path_factory.mktemp("untied")), "odd", tie_word_embeddings=False)


def tiny_pair(checkpoint: Path, variant: str, **overrides: int) -> Pair:
    if variant == "even":
        make_tiny_checkpoint(checkpoint, seed=11, eos_bias=3.0, **overrides)
    else:
        make_tiny_checkpoint(checkpoint, seed=12, eos_bias=5.0, **TINY_ODD, **overrides)
    texts = random_texts(100, seed=3, max_words=7)
    languages = [(TINY_LANGUAGES[i % 3], TINY_LANGUAGES[1 + i % 2]) for i in range(len(texts))]
    return Pair.load(checkpoint, [(text, *pair) for text, pair in zip(texts, languages, strict=True)])


@pytest.mark.parametrize("search", TINY_CASES, ids=str)
def test_tiny_random_models(tiny: Pair, search: SearchOptions, tally: Tally) -> None:
    check(tiny, search, tally)


@pytest.mark.parametrize("search", SWITCH_CASES, ids=str)
def test_one_expert_a_token(switch: Pair, search: SearchOptions, tally: Tally) -> None:
    check(switch, search, tally)


@pytest.mark.parametrize("search", SWITCH_CASES, ids=str)
def test_an_output_projection_of_its_own(untied: Pair, search: SearchOptions, tally: Tally) -> None:
    head, embedding = untied.oracle.lm_head.weight, untied.oracle.model.shared.weight
    assert not torch.equal(head, embedding)
    check(untied, search, tally)


def heldout_sentences(count: int) -> list[Sentence]:
    """Sentences that the demonstration model was not trained on, every language as source and as target."""
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as file:
        entries = [json.loads(line)["texts"] for line in file]
    sentences = []
    for i, texts in enumerate(entries[:: len(entries) // count][:count]):
        src_lang = list(texts)[i % len(texts)]
        tgt_lang = DEMO_TARGETS[i % len(DEMO_TARGETS)]
        sentences.append((texts[src_lang], src_lang, tgt_lang))
    return sentences


@pytest.fixture(scope="module")
def demo() -> Pair:
    return Pair.load(DEMO, heldout_sentences(200))


@pytest.mark.parametrize("search", DEMO_CASES, ids=str)
def test_the_demonstration_model(demo: Pair, search: SearchOptions, tally: Tally) -> None:
    check(demo, search, tally)
