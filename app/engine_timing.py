"""Times the engine at work on this machine: the Translator with its scheduler, under loads made up of random ids.

Torch loads inside the functions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from app.cost.profile import cells_read
from app.cost.traces import Ints
from engine.config import EngineConfig, ModelConfig
from engine.types import EncodedBatch, Int32Array, SearchOptions, TranslationRequest

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
_FREE_SHARES = (0.0, 0.0, 0.25, 0.5)  # of the sentences in flight, that end before others take their places
_STEPS_ON_GPU = 16  # timed as one: a GPU is kept busy from one to the next, and read late
_NUM_RESERVED_IDS = 4  # bos, pad, eos, unk


class WallClock:
    """Seconds as they pass."""

    def now(self) -> float:
        """Seconds since some instant."""
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class CpuClock(WallClock):
    """Seconds of CPU time of this process; waiting costs nothing and passes at once. On a machine that others use, this is
    what one thread would take if it had its core to itself (but for the caches).
    """

    def __init__(self) -> None:
        self._waited_s = 0.0

    def now(self) -> float:
        """CPU time, and what was waited."""
        return time.process_time() + self._waited_s

    def wait(self, seconds: float) -> None:
        """Pass over so many seconds."""
        self._waited_s += seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """Steps of the engine in a row: live rows of each, cached tokens that all of them read (`cells_read`), source tokens of
    the sentences of each encoder pass among them, and what they took, everything included.
    """

    rows: tuple[int, ...]
    target_cells: float
    source_cells: float
    passes: tuple[tuple[int, ...], ...]
    seconds: float


class EngineTimer:
    """A runner and the loads that fit it. The model may be any: sentences are random ids, each decoded to its own limit.

    on_gpu; length_step: how the runner reads its caches (app.cost.profile.cells_read).
    """

    def __init__(
        self,
        runner: Runner | DeviceRunner,
        model: ModelConfig,
        config: EngineConfig,
        beam_size: int,
        clock: WallClock | None = None,
    ) -> None:
        self._runner, self._model, self._config = runner, model, config
        self._now = (clock or WallClock()).now
        self.on_gpu = config.device.startswith("cuda")
        # The kernels read what is cached. Plain torch pads, on the CPU in steps.
        self.length_step = 0 if self.on_gpu else LENGTH_STEP
        self.beam_size = beam_size
        most = min(config.max_source_slots, config.max_rows // beam_size)
        self.batches = sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})
        self._rng = np.random.default_rng(0)

    @property
    def num_loads(self) -> int:
        """Of one round of `measure`."""
        return len(self.batches) * len(_LOADS)

    def measure(self, num_steps: int) -> Iterator[list[Timing]]:
        """One round over all loads in random order: so many sentences in flight, for num_steps steps, or six times as many
        where their caches fill.
        """
        loads = [(batch, load) for batch in self.batches for load in _LOADS]
        for index in self._rng.permutation(len(loads)).tolist():
            batch, (source, target, times) = loads[index]
            yield self._measure_load(batch, source, target, times * num_steps)

    def _measure_load(self, batch: int, source: tuple[int, int], target: tuple[int, int], num_steps: int) -> list[Timing]:
        from engine.scheduler import Scheduler
        from engine.translator import Translator

        watched = _WatchedRunner(self._runner, self.beam_size, self.length_step)
        ids = _RandomIds(self._model, self._rng, self._bounded(source, self._config.max_source_tokens))
        translator = Translator(cast("Tokenizer", ids), Scheduler(self._config), cast("Runner", watched), self._config)
        low, high = self._bounded(target, self._config.max_target_tokens)
        in_flight = num_submitted = 0
        timings = []
        for _ in range(num_steps // self._group):
            self._synchronize()
            started = self._now()
            for _ in range(self._group):
                if in_flight <= (1 - self._rng.choice(_FREE_SHARES)) * batch:
                    for limit in self._rng.integers(low, high + 1, batch - in_flight).tolist():
                        options = SearchOptions(self.beam_size, max_target_tokens=limit, min_target_tokens=limit)
                        translator.submit(TranslationRequest(str(num_submitted), "", "", "", options))
                        num_submitted += 1
                    in_flight = batch
                in_flight -= len(translator.step())
            self._synchronize()
            timings.append(watched.take(self._now() - started))
            if translator.stats().num_retries:
                raise RuntimeError(
                    "the engine had to start sentences over while it was timed; see the log above for the fault"
                )
        self._runner.clear()
        return timings

    @property
    def _group(self) -> int:
        return _STEPS_ON_GPU if self.on_gpu else 1

    @staticmethod
    def _bounded(lengths: tuple[int, int], limit: int) -> tuple[int, int]:
        return min(lengths[0], limit), min(lengths[1], limit)

    def _synchronize(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(torch.device(self._config.device))


class _RandomIds:
    """Stands where a tokenizer is: any text is a random sentence of this many tokens, from and to."""

    def __init__(self, model: ModelConfig, rng: np.random.Generator, lengths: tuple[int, int]) -> None:
        self._model, self._rng, self._lengths = model, rng, lengths
        self.eos_token_id = model.eos_token_id

    def encode(self, text: str, src_lang: str) -> Int32Array:
        """int32[S]."""
        length = int(self._rng.integers(self._lengths[0], self._lengths[1] + 1))
        ids = self._rng.integers(_NUM_RESERVED_IDS, self._model.vocab_size, length, np.int32)
        ids[-1] = self.eos_token_id
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Nothing."""
        return ""

    def language_id(self, language: str) -> int:
        """Any id."""
        return _NUM_RESERVED_IDS


class _WatchedRunner:
    """A runner, and what it was asked to do since the last `take`. Sentences decode to their limits."""

    def __init__(self, runner: Runner | DeviceRunner, beam_size: int, length_step: int) -> None:
        self._runner, self._beam_size, self._length_step = runner, beam_size, length_step
        self._source_tokens: dict[int, int] = {}  # by slot
        self._decoding: dict[int, tuple[int, int]] = {}  # by slot: target tokens held, limit
        self._begin()

    def _begin(self) -> None:
        self._rows: list[int] = []
        self._target_cells = self._source_cells = 0.0
        self._passes: list[tuple[int, ...]] = []

    def take(self, seconds: float) -> Timing:
        """What was done since the last call."""
        timing = Timing(tuple(self._rows), self._target_cells, self._source_cells, tuple(self._passes), seconds)
        self._begin()
        return timing

    def encode(self, batch: EncodedBatch) -> None:
        """As Runner."""
        lengths: Ints = np.diff(batch.source_offsets).astype(np.int64)
        self._passes.append(tuple(lengths.tolist()))
        self._source_tokens.update(zip(batch.source_slots.tolist(), lengths.tolist(), strict=True))
        self._runner.encode(batch)

    def start(self, specs: Sequence[SearchSpec]) -> None:
        """As Runner."""
        self._decoding.update((spec.source_slot, (1, spec.max_tokens)) for spec in specs)
        self._runner.start(specs)

    def decode(self) -> list[SearchOutcome]:
        """As Runner. Of a sentence of n generated tokens the last step reads the start token and n - 1 of them."""
        self._decoding = {slot: (held + 1, limit) for slot, (held, limit) in self._decoding.items() if held < limit}
        if self._decoding:
            count, step = len(self._decoding), self._length_step
            held = [held for held, _ in self._decoding.values()]
            source = [self._source_tokens[slot] for slot in self._decoding]
            self._rows.append(count * self._beam_size)
            self._target_cells += self._beam_size * cells_read(count, sum(held), max(held), step)
            self._source_cells += cells_read(count, sum(source), max(source), step)
        return self._runner.decode()

    def remove(self, source_slots: Sequence[int]) -> None:
        """As Runner."""
        self._runner.remove(source_slots)

    def clear(self) -> None:
        """As Runner."""
        self._runner.clear()
