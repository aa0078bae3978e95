from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.bench.ours import engine_config, make_runner
from engine.bench.random_model import RandomWeights, random_transformer
from engine.bench.report import mix_lines
from engine.bench.serving_mix import TokenIdTokenizer, draw_mix, mix_config, run_mix, serve, with_arrivals
from engine.bench.shapes import SHAPES, Cell, Variant
from engine.scheduler import Scheduler
from engine.step_clock import GapReport
from engine.translator import Translator

TINY = SHAPES["tiny"]


def test_lengths_follow_the_documented_distribution() -> None:
    sentences = draw_mix(SHAPES["paper"], 4000, 1)
    sources = np.array([len(s.request.source_text.split()) for s in sentences])
    targets = np.array([s.request.search.max_target_tokens for s in sentences])
    assert sources.min() >= 5
    assert sources.max() <= 200
    assert np.median(sources) == pytest.approx(24, abs=1)
    assert sources.mean() == pytest.approx(29, abs=1)
    assert np.percentile(sources, 95) == pytest.approx(64, abs=4)
    assert np.corrcoef(sources, targets)[0, 1] > 0.9
    assert all(s.request.search.min_target_tokens == t for s, t in zip(sentences, targets, strict=True))
    assert draw_mix(SHAPES["paper"], 4000, 1) == sentences


def test_arrivals_are_a_poisson_stream_of_the_same_sentences() -> None:
    sentences = draw_mix(TINY, 3000, 1)
    stream = with_arrivals(sentences, 50.0)
    gaps = np.diff([0.0] + [s.arrival_s for s in stream])
    assert [s.request for s in stream] == [s.request for s in sentences]
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)


@pytest.fixture(scope="module")
def mix() -> tuple[Translator, object]:
    base = engine_config(
        [Cell(1, 1)], device="cpu", variant=Variant("fp32"), source_tokens=24, target_tokens=32, num_threads=1
    )
    config = mix_config(base, rows=8, beam=2, num_sentences=14, max_tokens=24)
    runner = make_runner(random_transformer(RandomWeights(TINY, torch.device("cpu")), config), config)
    return Translator(TokenIdTokenizer(TINY), Scheduler(config), runner, config), (runner, config)


def test_static_batches_wait_for_their_slowest(mix: tuple[Translator, object]) -> None:
    """Steps of a static run = the sum over batches of the longest target; continuous batching needs fewer."""
    translator, _ = mix
    sentences = draw_mix(TINY, 14, 2, max_tokens=24)
    longest = [
        max(s.request.search.max_target_tokens or 0 for s in sentences[i : i + 4]) - 1 for i in range(0, len(sentences), 4)
    ]
    static, static_results = serve(translator, sentences, 4)
    continuous, continuous_results = serve(translator, sentences, None)
    assert static.num_steps == sum(longest)
    assert continuous.num_steps < static.num_steps
    for sentence in sentences:
        name = sentence.request.request_id
        assert static_results[name].hypotheses[0].target_token_ids == continuous_results[name].hypotheses[0].target_token_ids
        assert static_results[name].num_target_tokens == sentence.request.search.max_target_tokens


def test_sentences_are_not_served_before_they_arrive(mix: tuple[Translator, object]) -> None:
    translator, _ = mix
    stream = with_arrivals(draw_mix(TINY, 6, 2, max_tokens=24), 40.0)
    result, results = serve(translator, stream, None)
    assert len(results) == 6
    assert result.sentences_per_s <= 6 / stream[-1].arrival_s
    assert 0 < result.latency_p50_s <= result.latency_p99_s


def test_the_report_compares_both_ways(mix: tuple[Translator, object]) -> None:
    _, (runner, config) = mix
    report = run_mix(runner, TINY, config, draw_mix(TINY, 14, 2, max_tokens=24), 2)
    assert report.equal_share == 1.0
    assert report.ratio == pytest.approx(report.backlog_continuous.sentences_per_s / report.backlog_static.sentences_per_s)
    assert report.stream_sentences_per_s == pytest.approx(0.8 * report.backlog_static.sentences_per_s)


def test_gaps_of_the_device_are_printed_where_they_were_measured(mix: tuple[Translator, object]) -> None:
    _, (runner, config) = mix
    report = run_mix(runner, TINY, config, draw_mix(TINY, 4, 2, max_tokens=24), 2)
    assert report.gaps is None
    assert "50 us" not in mix_lines(report)
    spans = np.array([[0, 1000], [1020, 2000], [2400, 3000]]) * 1000
    text = mix_lines(replace(report, gaps=GapReport.from_spans(spans)))
    assert "50.0% of 3 passes begin within 50 us" in text
    assert "longest 400 us" in text
