"""One replica replayed on paper: the engine's own scheduler under a clock that a profile moves.

The engine admits sentences between decode steps (continuous batching), so a batch server is only its outline. Here the very
code that admits live decides, and every encoder pass and decode step takes what the profile says.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np

from app.cost.profile import Profile
from app.cost.traces import Floats, Ints
from engine.config import EngineConfig
from engine.scheduler import GenerationState, Scheduler
from engine.types import SearchOptions, TranslationRequest


@dataclass(frozen=True, slots=True)
class Sentences:
    """N sentences to come: source_tokens and steps (decode steps until the search ends) int64[N]."""

    source_tokens: Ints
    steps: Ints

    def __post_init__(self) -> None:
        if (
            self.source_tokens.shape != self.steps.shape
            or self.steps.min(initial=1) < 1
            or self.source_tokens.min(initial=1) < 1
        ):
            raise ValueError("source_tokens and steps need one positive value per sentence")


def replay_engine(profile: Profile, config: EngineConfig, sentences: Sentences, arrival_s: Floats) -> Floats:
    """Latency float64[N] of sentences that arrive at arrival_s float64[N], rising; all with the profile's beam size."""
    count = len(arrival_s)
    now = 0.0
    scheduler = Scheduler(replace(config, max_waiting=max(count, 1)), clock=lambda: now, epoch_clock=lambda: now)
    search = SearchOptions(beam_size=profile.beam_size)
    latency = np.zeros(count)
    running: list[tuple[int, int, int]] = []  # (step of the end, slot, sentence)
    arrived = num_steps = num_done = cached_tokens = 0
    while num_done < count:
        while arrived < count and arrival_s[arrived] <= now:
            request = TranslationRequest(str(arrived), "", "", "", search)
            source = np.zeros(int(sentences.source_tokens[arrived]), np.int32)
            scheduler.submit(GenerationState(request, source, 0, 2))
            now += profile.host_s
            arrived += 1
        if not scheduler.num_waiting and not running:
            now = max(now, float(arrival_s[arrived]))
            continue
        if admitted := scheduler.admit():
            now += profile.encode_s(np.array([len(state.source_token_ids) for state in admitted], np.float64))
            for state in admitted:
                sentence = int(state.request.request_id)
                heapq.heappush(running, (num_steps + int(sentences.steps[sentence]), state.source_slot, sentence))
        now += profile.step_s(scheduler.num_live_rows, cached_tokens)
        num_steps += 1
        cached_tokens += scheduler.num_live_rows
        while running and running[0][0] <= num_steps:
            _, slot, sentence = heapq.heappop(running)
            scheduler.finish(slot)
            cached_tokens -= profile.beam_size * int(sentences.steps[sentence])
            latency[sentence] = now - arrival_s[sentence]
            num_done += 1
    return latency


def max_rate_per_s(profile: Profile, config: EngineConfig, sentences: Sentences) -> float:
    """Sentences per second when all of them wait from the start: the rate that no queue survives."""
    return len(sentences.steps) / float(replay_engine(profile, config, sentences, np.zeros(len(sentences.steps))).max())
