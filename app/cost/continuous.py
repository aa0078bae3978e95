"""One replica replayed on paper: the engine's own scheduler under a clock that a profile moves.

The engine admits sentences between decode steps (continuous batching), so a batch server is only its outline. Here the very
code that admits live decides, and every encoder pass and decode step takes what the profile says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from app.cost.profile import Profile, cells_read
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
    running = _Running(profile, sentences)
    arrived = num_done = 0
    while num_done < count:
        while arrived < count and arrival_s[arrived] <= now:
            request = TranslationRequest(str(arrived), "", "", "", search)
            source = np.zeros(int(sentences.source_tokens[arrived]), np.int32)
            scheduler.submit(GenerationState(request, source, 0, 2))
            arrived += 1
        if not scheduler.num_waiting and not running.decoding:
            now = max(now, float(arrival_s[arrived]))
            continue
        if admitted := scheduler.admit():
            now += profile.encode_s(np.array([len(state.source_token_ids) for state in admitted], np.float64))
            now += profile.host_s * len(admitted)
            for state in admitted:
                running.start(state)
        now += running.step_s()
        ended = running.step()
        now += profile.ending_s if ended else 0.0
        for sentence, slot in ended:
            scheduler.finish(slot)
            latency[sentence] = now - arrival_s[sentence]
            num_done += 1
    return latency


class _Running:
    """The sentences that decode: when each began and ends, counted in steps."""

    def __init__(self, profile: Profile, sentences: Sentences) -> None:
        self._profile, self._sentences = profile, sentences
        self._num_steps = 0
        self.decoding: dict[int, tuple[int, int, int]] = {}  # by sentence: first step, step of the end, slot

    def start(self, state: GenerationState) -> None:
        """From the next step on."""
        sentence = int(state.request.request_id)
        end = self._num_steps + int(self._sentences.steps[sentence])
        self.decoding[sentence] = (self._num_steps, end, state.source_slot)

    def step_s(self) -> float:
        """Seconds of the next step. A sentence's first step holds two target tokens: the start token and the language."""
        count, beam_size = len(self.decoding), self._profile.beam_size
        held = [self._num_steps - first + 2 for first, _, _ in self.decoding.values()]
        source = self._sentences.source_tokens[list(self.decoding)]
        step = self._profile.length_step
        target_cells = beam_size * cells_read(count, sum(held), max(held), step)
        source_cells = cells_read(count, float(source.sum()), float(source.max()), step)
        return self._profile.step_s(beam_size * count, target_cells, source_cells)

    def step(self) -> list[tuple[int, int]]:
        """(sentence, slot) of those that end with this step."""
        self._num_steps += 1
        ended = [(sentence, slot) for sentence, (_, end, slot) in self.decoding.items() if end <= self._num_steps]
        for sentence, _ in ended:
            del self.decoding[sentence]
        return ended


def max_rate_per_s(profile: Profile, config: EngineConfig, sentences: Sentences) -> float:
    """Sentences per second when all of them wait from the start: the rate that no queue survives."""
    return len(sentences.steps) / float(replay_engine(profile, config, sentences, np.zeros(len(sentences.steps))).max())
