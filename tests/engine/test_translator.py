"""The Translator's contract: order, errors, cancellation, deadlines, faults that must not spread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from engine.config import ConfigError, EngineConfig
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import (
    EngineFullError,
    FinishReason,
    RequestError,
    SearchOptions,
    Translation,
    TranslationRequest,
)
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import TINY_LANGUAGES, random_texts, write_tiny_tokenizer

GREEDY = SearchOptions(beam_size=1, max_target_tokens=8)
CONFIG = EngineConfig(
    precision="fp32",
    max_rows=9,
    max_source_slots=5,
    max_target_tokens=12,
    max_source_tokens=24,
    encode_token_budget=48,
    max_waiting=6,
)
TEXTS = random_texts(30, seed=2, max_words=3)


class FaultyTokenizer(Tokenizer):
    """Cannot decode what was said in one language."""

    def decode(self, token_ids: Iterable[int]) -> str:
        ids = list(token_ids)
        if ids[0] == self.language_id("deu_Latn"):
            raise UnicodeError("tokenizer fault")
        return super().decode(ids)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(write_tiny_tokenizer(tmp_path_factory.mktemp("translator")), seed=4, eos_bias=3.0)


@pytest.fixture
def translator(checkpoint: Path) -> Translator:
    return Translator.load(checkpoint, CONFIG)


def make_request(
    name: str,
    text: str = "the hen",
    search: SearchOptions = GREEDY,
    *,
    src_lang: str = "eng_Latn",
    tgt_lang: str = "fra_Latn",
    time_budget_s: float | None = None,
) -> TranslationRequest:
    return TranslationRequest(name, text, src_lang, tgt_lang, search, time_budget_s=time_budget_s)


def drain(translator: Translator) -> dict[str, Translation]:
    ended: dict[str, Translation] = {}
    while translator.has_work:
        for translation in translator.step():
            assert translation.request_id not in ended
            ended[translation.request_id] = translation
    return ended


def assert_idle(translator: Translator) -> None:
    stats = translator.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_live_rows) == (0, 0, 0)
    assert not translator.has_work


def test_translate_keeps_the_order_of_a_long_list(translator: Translator) -> None:
    search = SearchOptions(beam_size=3, num_hypotheses=2)
    translations = translator.translate(TEXTS, src_lang="eng_Latn", tgt_lang="deu_Latn", search=search)
    assert len(translations) == len(TEXTS) > CONFIG.max_waiting
    for text, translation in zip(TEXTS, translations, strict=True):
        [alone] = translator.translate([text], src_lang="eng_Latn", tgt_lang="deu_Latn", search=search)
        assert [h.target_token_ids for h in alone.hypotheses] == [h.target_token_ids for h in translation.hypotheses]
        assert alone.num_source_tokens == translation.num_source_tokens
        assert translation.ok
        assert [h.score for h in translation.hypotheses] == sorted((h.score for h in translation.hypotheses), reverse=True)
        assert translation.finish_reason in (FinishReason.EOS, FinishReason.LENGTH)
        ends_with_eos = translation.hypotheses[0].target_token_ids[-1] == 2
        assert ends_with_eos == (translation.finish_reason is FinishReason.EOS)
        assert min(translation.timings.queue_s, translation.timings.encode_s, translation.timings.decode_s) >= 0
    assert_idle(translator)


def test_translate_of_nothing_is_nothing(translator: Translator) -> None:
    assert translator.translate([], src_lang="eng_Latn", tgt_lang="fra_Latn") == []


def test_translate_names_the_bad_text_and_starts_nothing(translator: Translator) -> None:
    with pytest.raises(RequestError, match=r"texts\[2\]: the source text is empty") as caught:
        translator.translate(["on", "an", " \n"], src_lang="eng_Latn", tgt_lang="fra_Latn")
    assert caught.value.code == "empty_text"
    assert_idle(translator)
    assert translator.stats().num_decode_steps == 0


def test_translate_refuses_to_swallow_the_results_of_others(translator: Translator) -> None:
    translator.submit(make_request("mine"))
    with pytest.raises(RuntimeError, match="idle engine"):
        translator.translate(["on"], src_lang="eng_Latn", tgt_lang="fra_Latn")
    assert drain(translator)["mine"].ok


def test_an_interrupted_translate_leaves_an_idle_engine(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = translator.step, iter(range(100))

    def interrupted() -> list[Translation]:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(translator, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        translator.translate(TEXTS, src_lang="eng_Latn", tgt_lang="fra_Latn")
    monkeypatch.undo()
    assert_idle(translator)
    assert translator.translate(["on"], src_lang="eng_Latn", tgt_lang="fra_Latn")[0].ok


def test_languages_come_from_the_tokenizer(translator: Translator) -> None:
    assert translator.languages == TINY_LANGUAGES


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (make_request("a", tgt_lang="xyz_Latn"), "unsupported_language"),
        (make_request("a", src_lang="fra"), "unsupported_language"),
        (make_request("a", text="\t \n"), "empty_text"),
        (make_request("a", text="x" * 25), "source_too_long"),
        (make_request("a", search=SearchOptions(max_target_tokens=13)), "invalid_option"),
        (make_request("a", search=SearchOptions(max_target_tokens=1)), "invalid_option"),
        (make_request("a", search=SearchOptions(min_target_tokens=13)), "invalid_option"),
        (make_request("a", search=SearchOptions(min_target_tokens=5, max_target_tokens=4)), "invalid_option"),
    ],
)
def test_a_bad_request_is_refused_and_queues_nothing(translator: Translator, bad: TranslationRequest, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        translator.submit(bad)
    assert caught.value.code == code
    assert_idle(translator)


def test_the_longest_source_that_fits_is_translated_whole(translator: Translator) -> None:
    translator.submit(make_request("a", text="x" * 21))  # language tag, "▁", 21 letters, eos
    assert drain(translator)["a"].num_source_tokens == 24


@pytest.mark.parametrize("field", [{"vocab_size": 44}, {"eos_token_id": 3}])
def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path, field: dict[str, int]) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **field}), encoding="utf-8")
    with pytest.raises(ConfigError, match="not of the same model"):
        Translator.load(tmp_path, CONFIG)


def test_more_beams_than_rows_is_refused(checkpoint: Path) -> None:
    translator = Translator.load(checkpoint, EngineConfig(precision="fp32", max_rows=3))
    with pytest.raises(RequestError, match="beam_size 4 is more than max_rows 3"):
        translator.submit(make_request("a", search=SearchOptions(beam_size=4)))


def test_a_full_queue_refuses_and_recovers(translator: Translator) -> None:
    for i in range(CONFIG.max_waiting):
        translator.submit(make_request(str(i)))
    with pytest.raises(EngineFullError):
        translator.submit(make_request("one too many"))
    translator.step()
    translator.submit(make_request("later"))
    assert sorted(drain(translator)) == ["0", "1", "2", "3", "4", "5", "later"]


def test_cancelling_takes_effect_within_one_step(translator: Translator) -> None:
    wide = SearchOptions(beam_size=8, min_target_tokens=10)
    for name in ("running", "waiting", "kept"):
        translator.submit(make_request(name, search=wide))
    translator.step()
    assert translator.stats().num_live_rows == 8
    assert [translator.cancel(name) for name in ("running", "waiting", "stranger")] == [True, True, False]
    ended = translator.step()
    assert {t.request_id: t.finish_reason for t in ended} == dict.fromkeys(("running", "waiting"), FinishReason.CANCELLED)
    assert all(not t.ok and t.error and t.num_target_tokens == 0 for t in ended)
    assert not translator.cancel("running")
    assert drain(translator)["kept"].ok
    assert_idle(translator)


def test_a_deadline_ends_a_running_and_a_waiting_sentence(checkpoint: Path) -> None:
    clock = Clock()
    scheduler = Scheduler(CONFIG, clock=clock)
    translator = Translator(Tokenizer.from_checkpoint(checkpoint), scheduler, Runner.load(checkpoint, CONFIG), CONFIG)
    wide = SearchOptions(beam_size=8, min_target_tokens=10)
    for name, budget in (("running", 5.0), ("waiting", 3.0), ("patient", None)):
        translator.submit(make_request(name, search=wide, time_budget_s=budget))
    assert translator.step() == []
    clock.now_s += 3.0
    assert [(t.request_id, t.finish_reason) for t in translator.step()] == [("waiting", FinishReason.DEADLINE)]
    clock.now_s += 2.0
    assert [(t.request_id, t.finish_reason) for t in translator.step()] == [("running", FinishReason.DEADLINE)]
    assert drain(translator)["patient"].ok
    assert_idle(translator)


def test_tokens_that_cannot_be_decoded_fail_their_sentence_only(checkpoint: Path) -> None:
    tokenizer = FaultyTokenizer.from_checkpoint(checkpoint)
    translator = Translator(tokenizer, Scheduler(CONFIG), Runner.load(checkpoint, CONFIG), CONFIG)
    for name, tgt_lang in (("german", "deu_Latn"), ("french", "fra_Latn")):
        translator.submit(make_request(name, tgt_lang=tgt_lang))
    ended = drain(translator)
    assert (ended["german"].finish_reason, ended["german"].error) == (FinishReason.ERROR, "UnicodeError: tokenizer fault")
    assert ended["french"].ok


def test_progress_is_shown_when_asked_for(translator: Translator, capsys: pytest.CaptureFixture[str]) -> None:
    translator.translate(["on", "an"], src_lang="eng_Latn", tgt_lang="fra_Latn")
    assert capsys.readouterr().err == ""
    translator.translate(["on", "an"], src_lang="eng_Latn", tgt_lang="fra_Latn", progress=True)
    assert "2/2" in capsys.readouterr().err


def test_steps_without_work_are_free_of_results(translator: Translator) -> None:
    assert translator.step() == []
    assert_idle(translator)
    assert translator.stats().num_decode_steps == 0


def test_stats_count_passes_and_steps(translator: Translator) -> None:
    translator.submit(make_request("a"))
    translator.submit(make_request("b"))
    translator.step()
    stats = translator.stats()
    assert (stats.num_running, stats.num_live_rows, stats.num_encode_passes, stats.num_decode_steps) == (2, 2, 1, 1)
    assert (stats.max_rows, stats.max_waiting) == (CONFIG.max_rows, CONFIG.max_waiting)
