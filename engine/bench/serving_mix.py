"""Serving mix: sentences of all lengths in a stream, continuous batching beside static batches of the same engine.

Lengths follow news text: source tokens are log-normal with median 24 and sigma 0.6 (mean 29, 95th percentile 64), clipped
to 5 - 200; a translation has source tokens * log-normal(0, 0.15) tokens, clipped alike, and exactly so many are generated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from engine.bench.inputs import NUM_RESERVED_IDS
from engine.config import EngineConfig, ModelConfig
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.step_clock import GapReport, StepClock
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import Int32Array, SearchOptions, Translation, TranslationRequest

if TYPE_CHECKING:
    from engine.device_runner import DeviceRunner

MIN_TOKENS, MAX_TOKENS = 5, 200
_MEDIAN_TOKENS, _LENGTH_SIGMA, _RATIO_SIGMA = 24.0, 0.6, 0.15
STREAM_LOAD = 0.8  # of what static batches can do


class TokenIdTokenizer(Tokenizer):
    """Texts that are token ids already ("17 4 305"), languages that are a token's id: a random model has no words."""

    def __init__(self, config: ModelConfig) -> None:
        self.eos_token_id = config.eos_token_id
        self._num_ids = config.vocab_size

    @property
    def languages(self) -> tuple[str, ...]:
        """None has a name."""
        return ()

    def language_id(self, code: str) -> int:
        """The number itself."""
        return int(code)

    def encode(self, text: str, src_lang: str) -> Int32Array:
        """The numbers of the text, eos among them already."""
        return np.array(text.split(), dtype=np.int32)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Back to numbers."""
        return " ".join(map(str, token_ids))


@dataclass(frozen=True, slots=True)
class MixSentence:
    """One request of the stream; arrival_s counts from its start."""

    request: TranslationRequest
    arrival_s: float


@dataclass(frozen=True, slots=True)
class StreamResult:
    """How one way of batching did. Latency runs from arrival to the last token."""

    sentences_per_s: float
    tokens_per_s: float
    latency_p50_s: float
    latency_p99_s: float
    num_steps: int


@dataclass(frozen=True, slots=True)
class MixReport:
    """backlog: everything waits from the start; stream: Poisson arrivals at `stream_sentences_per_s`.

    ratio: continuous over static sentences/s with a backlog. equal_share: translations equal in both. gaps: of the device
    during backlog_continuous; None without a clock.
    """

    precision: str
    num_sentences: int
    rows: int
    beam: int
    mean_source_tokens: float
    mean_target_tokens: float
    backlog_static: StreamResult
    backlog_continuous: StreamResult
    ratio: float
    equal_share: float
    stream_sentences_per_s: float
    stream_static: StreamResult
    stream_continuous: StreamResult
    gaps: GapReport | None = None


def draw_mix(
    config: ModelConfig, num_sentences: int, beam: int, *, max_tokens: int = MAX_TOKENS, seed: int = 0
) -> list[MixSentence]:
    """Random sentences, all there from the start; see `with_arrivals`."""
    generator = np.random.default_rng(seed)
    sources = _MEDIAN_TOKENS * np.exp(_LENGTH_SIGMA * generator.standard_normal(num_sentences))
    source_lengths = sources.round().clip(MIN_TOKENS, max_tokens).astype(int)
    targets = source_lengths * np.exp(_RATIO_SIGMA * generator.standard_normal(num_sentences))
    target_lengths = targets.round().clip(MIN_TOKENS, max_tokens).astype(int)
    sentences = []
    for index, (source, target) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
        ids = [*generator.integers(NUM_RESERVED_IDS, config.vocab_size, source - 1).tolist(), config.eos_token_id]
        forced = int(generator.integers(NUM_RESERVED_IDS, config.vocab_size))
        options = SearchOptions(beam_size=beam, max_target_tokens=target, min_target_tokens=target)
        request = TranslationRequest(str(index), " ".join(map(str, ids)), "0", str(forced), options)
        sentences.append(MixSentence(request, 0.0))
    return sentences


def with_arrivals(sentences: Sequence[MixSentence], sentences_per_s: float, *, seed: int = 1) -> list[MixSentence]:
    """The same sentences as a Poisson stream."""
    gaps = np.random.default_rng(seed).exponential(1.0 / sentences_per_s, len(sentences))
    return [replace(s, arrival_s=float(at)) for s, at in zip(sentences, gaps.cumsum(), strict=True)]


def mix_config(
    base: EngineConfig, *, rows: int, beam: int, num_sentences: int, max_tokens: int = MAX_TOKENS
) -> EngineConfig:
    """`base` with room for `rows` live hypotheses, all of `beam`, and a queue for all sentences."""
    return replace(
        base,
        max_rows=rows,
        max_source_slots=rows // beam,
        max_source_tokens=max_tokens,
        max_target_tokens=max_tokens,
        encode_token_budget=max(2048, max_tokens),
        max_waiting=num_sentences,
    )


def serve(
    translator: Translator, sentences: Sequence[MixSentence], static_batch: int | None
) -> tuple[StreamResult, dict[str, Translation]]:
    """Feed the stream. static_batch None: every sentence is submitted as it arrives. Else: when the engine is empty, up to
    so many that have arrived are submitted together, and the next ones wait until all of these are done.
    """
    arrivals = {s.request.request_id: s.arrival_s for s in sentences}
    waiting = deque(sorted(sentences, key=lambda s: s.arrival_s))
    results: dict[str, Translation] = {}
    latencies = []
    steps_before = translator.stats().num_decode_steps
    start = time.perf_counter()
    while waiting or translator.has_work:
        now = time.perf_counter() - start
        if static_batch is None or not translator.has_work:
            room = static_batch or len(waiting)
            while waiting and waiting[0].arrival_s <= now and room:
                translator.submit(waiting.popleft().request)
                room -= 1
        if not translator.has_work:
            time.sleep(max(0.0, waiting[0].arrival_s - now))
            continue
        for translation in translator.step():
            if not translation.ok:
                raise RuntimeError(f"sentence {translation.request_id} of the mix failed: {translation.error}")
            results[translation.request_id] = translation
            latencies.append(time.perf_counter() - start - arrivals[translation.request_id])
    total_s = time.perf_counter() - start
    p50, p99 = np.percentile(latencies, (50, 99)).tolist()
    num_tokens = sum(translation.num_target_tokens for translation in results.values())
    steps = translator.stats().num_decode_steps - steps_before
    return StreamResult(len(results) / total_s, num_tokens / total_s, p50, p99, steps), results


def run_mix(
    runner: Runner | DeviceRunner,
    model_config: ModelConfig,
    config: EngineConfig,
    sentences: Sequence[MixSentence],
    beam: int,
    clock: StepClock | None = None,
) -> MixReport:
    """Both ways with a backlog, then both with arrivals at STREAM_LOAD of the static rate. `config` and `clock` are the
    runner's."""
    translator = Translator(TokenIdTokenizer(model_config), Scheduler(config), runner, config)
    slots = config.max_source_slots
    serve(translator, sentences[:slots], slots)  # warm-up
    static, static_results = serve(translator, sentences, slots)
    if clock is not None:
        clock.reset()
    continuous, continuous_results = serve(translator, sentences, None)
    gaps = None if clock is None else clock.gaps()
    rate = STREAM_LOAD * static.sentences_per_s
    stream = with_arrivals(sentences, rate)
    stream_static, _ = serve(translator, stream, slots)
    stream_continuous, _ = serve(translator, stream, None)
    same = [
        static_results[key].hypotheses[0].target_token_ids == continuous_results[key].hypotheses[0].target_token_ids
        for key in static_results
    ]
    sources = [len(s.request.source_text.split()) for s in sentences]
    targets = [s.request.search.max_target_tokens or 0 for s in sentences]
    return MixReport(
        precision=config.precision,
        num_sentences=len(sentences),
        rows=config.max_rows,
        beam=beam,
        mean_source_tokens=sum(sources) / len(sources),
        mean_target_tokens=sum(targets) / len(targets),
        backlog_static=static,
        backlog_continuous=continuous,
        ratio=continuous.sentences_per_s / static.sentences_per_s,
        equal_share=sum(same) / len(same),
        stream_sentences_per_s=rate,
        stream_static=stream_static,
        stream_continuous=stream_continuous,
        gaps=gaps,
    )
