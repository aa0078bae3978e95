"""Times the engine at work on this machine: the Translator with its scheduler, under loads made up of random ids.

Torch loads inside the functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from app.clocks import WallClock
from app.cost.profile import cells_read
from app.cost.traces import Ints
from engine.config import EngineConfig, ModelConfig
from engine.types import EncodedBatch, ExpertLoad, Int32Array, SearchOptions, TranslationRequest

if TYPE_CHECKING:
    from engine.device_runner import DeviceRunner
    from engine.runner import Runner
    from engine.search.spec import SearchOutcome, SearchSpec
    from engine.tokenizer import Tokenizer

LENGTH_STEP = 16  # engine.kv_cache.LENGTH_STEP, which loads torch; a test compares the two
_LOADS = (
    ((4, 10), (4, 12), 1),
    ((10, 48), (8, 64), 6),
    ((64, 128), (4, 12), 1),
)  # source tokens, target tokens, times the steps
_LOADS_ON_GPU = (*_LOADS, ((64, 128), (32, 64), 2))  # what is read of the source, apart from encoding it
_FREE_SHARES = (0.0, 0.0, 0.25, 0.5)  # of the sentences in flight, that end before others take their places
_STEPS_ON_GPU = 16  # timed as one: a GPU has work queued from one to the next, and is read late
_NUM_RESERVED_IDS = 4  # bos, pad, eos, unk
_TEXT = (  # what is tokenized, about a token a word
    "The file could not be saved because the disk is full, so please close other windows, remove what you no longer need, "
    "and then try again in a few minutes, or ask whoever looks after this machine for more space."
)


@dataclass(frozen=True, slots=True)
class Timing:
    """What the engine did in a row, and what it took, everything included.

    rows, target_cells: live rows of each decode step, and cached target tokens that it reads (`cells_read`). source_cells:
    cached source tokens that all steps read. passes: source tokens of the sentences of each encoder pass. num_started,
    num_ended: sentences that had their first step and that came back, where that is seen in time (not on a GPU, which is
    read late).
    """

    rows: tuple[int, ...]
    target_cells: tuple[float, ...]
    source_cells: float
    passes: tuple[tuple[int, ...], ...]
    seconds: float
    num_started: int = 0
    num_ended: int = 0


class EngineTimer:
    """A runner and the loads that fit it. The model may be any: sentences are random ids. With a tokenizer, on a CPU, as
    long a text is tokenized for each of them and what comes out is detokenized, so that timings hold that too: between
    passes, when its tables are no longer in the caches, it takes several times as long as in a loop.

    on_gpu; length_step: how the runner reads its caches (app.cost.profile.cells_read); clock: what times are told by.
    """

    def __init__(
        self,
        runner: Runner | DeviceRunner,
        model: ModelConfig,
        config: EngineConfig,
        beam_size: int,
        clock: WallClock | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._runner, self._model, self._config = runner, model, config
        self.clock = clock or WallClock()
        self.on_gpu = config.device.startswith("cuda")
        # The kernels read what is cached. Plain torch pads, on the CPU in steps.
        self.length_step = 0 if self.on_gpu else LENGTH_STEP
        self._tokenizer = None if self.on_gpu else tokenizer
        self.beam_size = beam_size
        most = min(config.max_source_slots, config.max_rows // beam_size)
        self.batches = sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})
        self._rng = np.random.default_rng(0)

    def num_parts(self, num_steps: int) -> int:
        """Of one round of `measure`."""
        return len(self.batches) * sum(times * num_steps // self._group for _, _, times in self._loads)

    def measure(self, num_steps: int) -> Iterator[list[Timing]]:
        """One round over all loads in random order, part by part: so many sentences in flight, for num_steps steps, or six
        times as many where their caches fill. On a CPU encoder passes and decode steps are timed one by one, on a GPU in
        groups, from the end of one to the end of the next on the device: a fit tells one from the other.
        """
        loads = [(batch, load) for batch in self.batches for load in self._loads]
        for index in self._rng.permutation(len(loads)).tolist():
            batch, (source, target, times) = loads[index]
            yield from self._measure_load(batch, source, target, times * num_steps)

    def _measure_load(
        self, batch: int, source: tuple[int, int], target: tuple[int, int], num_steps: int
    ) -> Iterator[list[Timing]]:
        from engine.scheduler import Scheduler
        from engine.translator import Translator

        clock = self.clock
        self._runner.clear()  # of a load that was left half way
        watched = _WatchedRunner(self._runner, self.beam_size, self.length_step, None if self.on_gpu else clock)
        lengths = self._bounded(source, self._config.max_source_tokens)
        ids = _RandomIds(self._model, self._rng, lengths, self._tokenizer, clock)
        translator = Translator(cast("Tokenizer", ids), Scheduler(self._config), cast("Runner", watched), self._config)
        low, high = self._bounded(target, self._config.max_target_tokens)
        in_flight = num_submitted = 0
        groups: list[Timing] = []  # on a GPU, and when it began and ended each
        marks: list[Any] = []
        for _ in range(num_steps // self._group):
            started, submitting_s = clock.now(), 0.0
            for _ in range(self._group):
                before = clock.now()
                if in_flight <= (1 - self._rng.choice(_FREE_SHARES)) * batch:
                    for limit in self._rng.integers(low, high + 1, batch - in_flight).tolist():
                        # Read late, the steps of a sentence are known only if it runs to its limit. A ban of eos is free
                        # on a GPU; in plain torch it copies all logits.
                        least = limit if self.on_gpu else 0
                        options = SearchOptions(self.beam_size, max_target_tokens=limit, min_target_tokens=least)
                        translator.submit(TranslationRequest(str(num_submitted), "", "", "", options))
                        num_submitted += 1
                    in_flight = batch
                submitting_s += clock.now() - before  # mostly drawing ids
                if self.on_gpu and not marks:
                    marks.append(self._mark())
                in_flight -= len(translator.step())
            unwanted_s = submitting_s - ids.take_tokenizing_s()
            timings = watched.take(clock.now() - started - unwanted_s)
            if translator.stats().num_retries:
                raise RuntimeError(
                    "the engine had to start sentences over while it was timed; see the log above for the fault"
                )
            if self.on_gpu:
                groups += timings
                marks.append(self._mark())
            else:
                yield timings
        for group, begun, ended in zip(groups, marks, marks[1:], strict=False):
            yield [replace(group, seconds=self._seconds_between(begun, ended))]
        self._runner.clear()

    @property
    def _group(self) -> int:
        return _STEPS_ON_GPU if self.on_gpu else 1

    @staticmethod
    def _bounded(lengths: tuple[int, int], limit: int) -> tuple[int, int]:
        return min(lengths[0], limit), min(lengths[1], limit)

    @property
    def _loads(self) -> tuple[tuple[tuple[int, int], tuple[int, int], int], ...]:
        return _LOADS_ON_GPU if self.on_gpu else _LOADS

    def _mark(self) -> Any:
        """Here in what the GPU has been given to do; the host goes on."""
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(torch.device(self._config.device)))
        return event

    def _seconds_between(self, begun: Any, ended: Any) -> float:
        """By the GPU's clock; waits until it has got there."""
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3


class _RandomIds:
    """Stands where a tokenizer is: any text is a random sentence of this many tokens, from and to. A tokenizer at hand does
    its work all the same.
    """

    def __init__(
        self,
        model: ModelConfig,
        rng: np.random.Generator,
        lengths: tuple[int, int],
        tokenizer: Tokenizer | None,
        clock: WallClock,
    ) -> None:
        self._model, self._rng, self._lengths, self._tokenizer, self._clock = model, rng, lengths, tokenizer, clock
        self._tokenizing_s = 0.0
        self.eos_token_id = model.eos_token_id

    def take_tokenizing_s(self) -> float:
        """Since the last call."""
        seconds, self._tokenizing_s = self._tokenizing_s, 0.0
        return seconds

    def encode(self, text: str, src_lang: str) -> Int32Array:
        """int32[S]."""
        length = int(self._rng.integers(self._lengths[0], self._lengths[1] + 1))
        ids = self._rng.integers(_NUM_RESERVED_IDS, self._model.vocab_size, length, np.int32)
        ids[-1] = self.eos_token_id
        if self._tokenizer is not None:
            words = " ".join(itertools.islice(itertools.cycle(_TEXT.split()), length))
            began = self._clock.now()
            self._tokenizer.encode(words, self._tokenizer.languages[0])
            self._tokenizing_s += self._clock.now() - began
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Nothing, or any text."""
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids)

    def language_id(self, language: str) -> int:
        """Any id."""
        return _NUM_RESERVED_IDS


class _WatchedRunner:
    """A runner, and what it was asked to do since the last `take`. Without a clock sentences decode to their limits."""

    def __init__(
        self, runner: Runner | DeviceRunner, beam_size: int, length_step: int, clock: WallClock | None = None
    ) -> None:
        self._runner, self._beam_size, self._length_step, self._clock = runner, beam_size, length_step, clock
        self._source_tokens: dict[int, int] = {}  # by slot
        self._decoding: dict[int, tuple[int, int]] = {}  # by slot: target tokens held, limit
        self._begin()

    def _begin(self) -> None:
        self._rows: list[int] = []
        self._target_cells: list[float] = []
        self._source_cells = self._pass_s = 0.0
        self._passes: list[tuple[int, ...]] = []
        self._num_started = self._num_ended = 0

    def take(self, seconds: float) -> list[Timing]:
        """What was done since the last call, in so many seconds; with a clock encoder passes on their own."""
        passes, timings = tuple(self._passes), []
        if self._clock is not None and passes:
            timings.append(Timing((), (), 0.0, passes, self._pass_s))
            passes = ()
        read = (tuple(self._target_cells), self._source_cells)
        counts = (self._num_started, self._num_ended) if self._clock is not None else (0, 0)
        timings.append(Timing(tuple(self._rows), *read, passes, seconds - self._pass_s, *counts))
        self._begin()
        return timings

    @property
    def expert_loads(self) -> tuple[ExpertLoad, ...]:
        """As Runner."""
        return self._runner.expert_loads

    def encode(self, batch: EncodedBatch) -> None:
        """As Runner."""
        lengths: Ints = np.diff(batch.source_offsets).astype(np.int64)
        self._passes.append(tuple(lengths.tolist()))
        self._source_tokens.update(zip(batch.source_slots.tolist(), lengths.tolist(), strict=True))
        began = self._now()
        self._runner.encode(batch)
        self._pass_s += self._now() - began

    def start(self, specs: Sequence[SearchSpec]) -> None:
        """As Runner; part of the pass."""
        self._decoding.update((spec.source_slot, (1, spec.max_tokens)) for spec in specs)
        self._num_started += len(specs)
        began = self._now()
        self._runner.start(specs)
        self._pass_s += self._now() - began

    def decode(self) -> list[SearchOutcome]:
        """As Runner. Of a sentence of n generated tokens the last step reads the start token and n - 1 of them."""
        self._decoding = {slot: (held + 1, limit) for slot, (held, limit) in self._decoding.items() if held < limit}
        if self._decoding:
            count, step, beams = len(self._decoding), self._length_step, self._beam_size
            held = [held for held, _ in self._decoding.values()]
            source = [self._source_tokens[slot] for slot in self._decoding]
            # A GPU's first step of a sentence: one beam (all would be alike) and the start token.
            num_new = held.count(2) if self._clock is None else 0
            self._rows.append((count - num_new) * beams + 2 * num_new)
            self._target_cells.append(beams * cells_read(count, sum(held), max(held), step) - 2 * num_new * (beams - 2))
            self._source_cells += cells_read(count, sum(source), max(source), step)
        outcomes = self._runner.decode()
        self._num_ended += len(outcomes)
        if self._clock is not None:
            for outcome in outcomes:
                self._decoding.pop(outcome.source_slot, None)
        return outcomes

    def remove(self, source_slots: Sequence[int]) -> None:
        """As Runner."""
        self._runner.remove(source_slots)

    def clear(self) -> None:
        """As Runner."""
        self._runner.clear()

    def _now(self) -> float:
        return self._clock.now() if self._clock is not None else 0.0
