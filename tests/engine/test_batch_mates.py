"""A sentence's ids do not depend on who shares its batch, on the order of arrival, or on how tight the engine is. fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.translator import Translator
from engine.types import SearchOptions, TranslationRequest
from tests.engine.tiny import TINY_ODD, make_tiny_checkpoint
from tests.engine.tiny_tokenizer import TINY_LANGUAGES, random_texts, write_tiny_tokenizer

TEXTS = random_texts(24, seed=8, max_words=6)
SEARCHES = [
    SearchOptions(beam_size=1, max_target_tokens=12),
    SearchOptions(beam_size=1, max_target_tokens=7, no_repeat_ngram_size=2),
    SearchOptions(beam_size=2, max_target_tokens=15, min_target_tokens=4),
    SearchOptions(beam_size=4, max_target_tokens=12, num_hypotheses=3),
    SearchOptions(beam_size=4, max_target_tokens=10, early_stopping=True, no_repeat_ngram_size=3),
    SearchOptions(beam_size=5, max_target_tokens=14, early_stopping="never", length_penalty=0.6),
]
Job = tuple[int, int, int]  # text, search, target language


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_tokenizer(tmp_path_factory.mktemp("mates"))
    return make_tiny_checkpoint(directory, seed=21, eos_bias=4.0, **TINY_ODD)


@pytest.fixture(scope="module")
def roomy(checkpoint: Path) -> Translator:
    config = EngineConfig(precision="fp32", max_rows=64, max_source_slots=32, max_target_tokens=20)
    return Translator.load(checkpoint, config)


@pytest.fixture(scope="module")
def tight(checkpoint: Path) -> Translator:
    config = EngineConfig(
        precision="fp32", max_rows=7, max_source_slots=3, max_target_tokens=16, max_source_tokens=40, encode_token_budget=40
    )
    return Translator.load(checkpoint, config)


@pytest.fixture(scope="module")
def alone(roomy: Translator) -> dict[Job, list[tuple[int, ...]]]:
    """Ids of every job translated with an empty engine around it, filled as jobs are asked for."""
    return {}


def request_of(name: str, job: Job) -> TranslationRequest:
    text, search, language = job
    return TranslationRequest(name, TEXTS[text], TINY_LANGUAGES[text % 3], TINY_LANGUAGES[language], SEARCHES[search])


def ids_alone(translator: Translator, job: Job, known: dict[Job, list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    if job not in known:
        translator.submit(request_of("alone", job))
        ended = []
        while translator.has_work:
            ended += translator.step()
        known[job] = [hypothesis.target_token_ids for hypothesis in ended[0].hypotheses]
    return known[job]


jobs = st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, len(SEARCHES) - 1), st.integers(0, 2))


@pytest.mark.parametrize("engine_name", ["roomy", "tight"])
@settings(max_examples=40)
@given(arrivals=st.lists(st.lists(jobs, max_size=6), min_size=1, max_size=8))
def test_ids_alone_and_in_any_company(
    arrivals: list[list[Job]],
    engine_name: str,
    roomy: Translator,
    tight: Translator,
    alone: dict[Job, list[tuple[int, ...]]],
) -> None:
    translator = roomy if engine_name == "roomy" else tight
    named = {f"{step}.{i}": job for step, batch in enumerate(arrivals) for i, job in enumerate(batch)}
    expected = {name: ids_alone(roomy, job, alone) for name, job in named.items()}
    ended = []
    for step, batch in enumerate(arrivals):
        for i, job in enumerate(batch):
            translator.submit(request_of(f"{step}.{i}", job))
        ended += translator.step()
    while translator.has_work:
        ended += translator.step()
    assert {t.request_id: [h.target_token_ids for h in t.hypotheses] for t in ended} == expected
    assert len(ended) == len(expected)


def test_leaving_mates_change_nothing(roomy: Translator, alone: dict[Job, list[tuple[int, ...]]]) -> None:
    job: Job = (3, 5, 1)
    expected = ids_alone(roomy, job, alone)
    roomy.submit(request_of("kept", job))
    for i in range(8):
        roomy.submit(request_of(f"mate{i}", (i + 4, i % len(SEARCHES), 2)))
    ended = roomy.step() + roomy.step()
    for i in range(0, 8, 2):
        roomy.cancel(f"mate{i}")
    while roomy.has_work:
        ended += roomy.step()
    assert [h.target_token_ids for t in ended if t.request_id == "kept" for h in t.hypotheses] == expected
