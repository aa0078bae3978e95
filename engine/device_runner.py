"""Device work through the kernels: captured encoder passes and decode steps, read back late.

While a step runs the next one is queued already, so the GPU does not wait for the host as long as what the host does between
two steps takes less than a step: `decode` waits for the oldest step under way, launches a new one without the sentences that
ended, and only then reads what they have become. Legend: R entries, S packed source tokens, P source slots.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from engine.config import EngineConfig, ModelConfig
from engine.cuda_graphs import CapturedSteps
from engine.expert_load import ExpertLoadMeter
from engine.kv_cache import KVCache
from engine.model.kernel_decoder import EntryGroups, KernelDecoder
from engine.model.kernel_encoder import KernelEncoder, PackedTokens
from engine.model.kernel_layers import KernelOptions
from engine.model.transformer import Transformer
from engine.runner import Runner
from engine.search.device_search import Composition, DeviceSearch, StepShape
from engine.search.spec import SearchOutcome, SearchSpec
from engine.search.transfer import copy_to_device, to_device
from engine.step_clock import StepClock
from engine.types import EncodedBatch, ExpertLoad
from engine.weights.loading import load_transformer
from kernels.beam_search.tables import BeamTables

HEAD_DIMS = (16, 32, 64, 128)  # what the attention kernels take
_STEPS_AHEAD = 2  # launched and not looked at: one that runs and one behind it


@dataclass(frozen=True, slots=True)
class _Step:
    """A launched decode step: who took part, and the event that says it is over."""

    composition: Composition
    ended: torch.cuda.Event | None


def supports_kernels(config: ModelConfig) -> bool:
    """True when the kernels can run this model; others run in plain torch."""
    heads = ((config.d_model // config.encoder_attention_heads), (config.d_model // config.decoder_attention_heads))
    return all(head_dim in HEAD_DIMS for head_dim in heads)


class DeviceRunner:
    """Runs encoder passes and decode steps for one Transformer on one device. Not thread-safe: one thread calls it."""

    def __init__(self, transformer: Transformer, engine_config: EngineConfig, clock: StepClock | None = None) -> None:
        config = transformer.config
        self._device = torch.device(engine_config.device)
        self._config = engine_config
        self._pad_token_id = config.pad_token_id
        self._vocab_size = config.vocab_size
        entries = size_buckets(engine_config.max_rows + engine_config.max_source_slots)
        self._token_buckets = size_buckets(engine_config.encode_token_budget, smallest=16)
        self._cache = KVCache.allocate(
            config,
            num_rows=engine_config.max_rows,
            max_target_tokens=engine_config.max_target_tokens,
            num_source_slots=engine_config.max_source_slots + 1,  # padding tokens write into the last one
            max_source_tokens=engine_config.max_source_tokens,
            dtype=transformer.dtype,
            device=self._device,
        )
        options = KernelOptions(fixed_order=engine_config.batch_invariant, int8_dense=engine_config.int8_dense)
        self._encoder = KernelEncoder(transformer, self._cache, max_tokens=self._token_buckets[-1], options=options)
        self._decoder = KernelDecoder(transformer, self._cache, max_entries=entries[-1], options=options)
        self._search = DeviceSearch(
            num_slots=engine_config.max_source_slots,
            num_rows=engine_config.max_rows,
            max_target_tokens=engine_config.max_target_tokens,
            start_token_id=config.decoder_start_token_id,
            eos_token_id=config.eos_token_id,
            entry_buckets=entries,
            device=self._device,
            lists_from=self._decoder.lists_from,
        )
        self._graphs = CapturedSteps(self._device, clock)
        self._expert_load = ExpertLoadMeter(transformer.encoder_load, transformer.decoder_load)
        self._packed = {s: torch.zeros((5, s), dtype=torch.int32, device=self._device) for s in self._token_buckets}
        on_gpu = self._device.type == "cuda"
        self._ended = [torch.cuda.Event() if on_gpu else None for _ in range(_STEPS_AHEAD + 1)]  # type: ignore[no-untyped-call]
        self._num_steps = 0
        self._in_flight: deque[_Step] = deque()

    @classmethod
    def load(cls, checkpoint: Path, engine_config: EngineConfig, *, progress: bool = False) -> Self:
        """Load the weights and capture the steps that a service needs first."""
        torch.set_num_threads(engine_config.num_threads)
        runner = cls(load_transformer(checkpoint, engine_config), engine_config)
        runner.warm_up(progress=progress)
        return runner

    @torch.inference_mode()
    def warm_up(self, *, max_beam_size: int = 4, progress: bool = False) -> None:
        """Compile kernels and capture steps of all sizes, greedy and up to `max_beam_size` beams; others at first use."""
        if self._device.type != "cuda":
            return
        candidates = (1,) if max_beam_size == 1 else (1, 8) if max_beam_size <= 4 else (1, 8, 16)
        # the largest first: the others fit into the memory that it leaves
        shapes = [StepShape(r, k, ()) for r in self._search.buckets[::-1] for k in candidates]
        for shape in tqdm(shapes, disable=not progress, desc="decode steps", unit="graph"):
            self._capture_step(shape)
        for num_tokens in tqdm(self._token_buckets[::-1], disable=not progress, desc="encoder passes", unit="graph"):
            self._capture_encoder(num_tokens)

    @property
    def expert_loads(self) -> tuple[ExpertLoad, ...]:
        """See EngineStats."""
        return self._expert_load.loads

    @torch.inference_mode()
    def encode(self, batch: EncodedBatch) -> None:
        """Encoder pass; the sentences' cross-attention keys and values go to their source slots.

        Raises ValueError for a sentence longer than a slot, and for a pass larger than encode_token_budget.
        """
        lengths = np.diff(batch.source_offsets)
        if len(lengths) == 0 or lengths.min() < 1 or lengths.max() > self._config.max_source_tokens:
            raise ValueError(f"source lengths are {lengths.tolist()}; 1 to {self._config.max_source_tokens} tokens fit")
        total = len(batch.source_token_ids)
        if total > self._token_buckets[-1]:
            raise ValueError(f"{total} source tokens in one pass; encode_token_budget is {self._token_buckets[-1]}")
        num_tokens = next(s for s in self._token_buckets if s >= total)
        self._capture_encoder(num_tokens)
        copy_to_device(self._packed[num_tokens], self._lay_out(batch, num_tokens))
        slots = to_device(np.stack([batch.source_slots, lengths.astype(np.int32)]), self._device)
        self._cache.source_lengths.index_copy_(0, slots[0].long(), slots[1])
        self._graphs.run(("encode", num_tokens), functools.partial(self._run_encoder, num_tokens))
        self._expert_load.encoded()

    @torch.inference_mode()
    def start(self, specs: Sequence[SearchSpec]) -> None:
        """Begin decoding sentences that are encoded."""
        self._search.add(specs)

    @torch.inference_mode()
    def decode(self) -> list[SearchOutcome]:
        """Launch one decode step for all live rows; returns the sentences that the oldest step under way finished, which is
        none while fewer than two are."""
        oldest = self._in_flight.popleft() if len(self._in_flight) == _STEPS_AHEAD else None
        closed = [] if oldest is None else self._wait(oldest)
        launched = self._launch()
        if launched is not None:
            self._in_flight.append(launched)
        elif oldest is None and self._in_flight:  # all sentences are at their limit: look at what is left
            oldest = self._in_flight.popleft()
            closed = self._wait(oldest)
        return self._search.read(closed) if closed else []

    @torch.inference_mode()
    def next_step(self) -> tuple[Callable[[], None], BeamTables]:
        """The launches of the next decode step, for whoever measures them, and the tables that they change: with those put
        back they may run again and again. Raises ValueError where no sentence would take part."""
        shape = self._search.plan()
        if shape is None:
            raise ValueError("no sentence takes part in a next step: start some")
        return functools.partial(self._run_step, shape), self._search.tables

    @torch.inference_mode()
    def remove(self, source_slots: Collection[int]) -> None:
        """Stop decoding the sentences of these slots; slots that are not decoding are ignored."""
        self._search.remove(source_slots)

    def clear(self) -> None:
        """Stop decoding every sentence; touches no device memory, so it works after a device fault."""
        self._search.clear()
        self._in_flight.clear()

    def _launch(self) -> _Step | None:
        shape = self._search.plan()
        if shape is None:
            return None
        if not self._graphs.has(shape):
            self._capture_step(shape)
            self._search.plan()
        self._graphs.run(shape, functools.partial(self._run_step, shape))
        ended = self._ended[self._num_steps % len(self._ended)]
        self._num_steps += 1
        if ended is not None:
            ended.record()
        self._expert_load.decoded()
        return _Step(self._search.took(), ended)

    def _wait(self, step: _Step) -> list[Any]:
        """The sentences that this step ended, which leave the search."""
        if step.ended is not None:
            step.ended.synchronize()
        return self._search.close(step.composition)

    def _capture_step(self, shape: StepShape) -> None:
        if not self._graphs.has(shape):
            self._search.plan_idle()
            self._graphs.capture(shape, functools.partial(self._run_step, shape))

    def _capture_encoder(self, num_tokens: int) -> None:
        key = ("encode", num_tokens)
        if not self._graphs.has(key):
            copy_to_device(self._packed[num_tokens], self._padding(num_tokens))
            self._graphs.capture(key, functools.partial(self._run_encoder, num_tokens))

    def _run_step(self, shape: StepShape) -> None:
        inputs = self._search.feed(shape)
        groups, ancestry = EntryGroups(*self._search.groups(shape)), self._search.tables.ancestry
        lists, usual_groups = self._search.history_lists(shape), self._search.usual_groups(shape)
        hidden = self._decoder.hidden(inputs, groups, ancestry, lists=lists, usual_groups=usual_groups)
        logits = None
        if shape.ngram_sizes:
            logits = torch.empty((hidden.shape[0], self._vocab_size), dtype=torch.float32, device=self._device)
        top = self._decoder.top_tokens(hidden, shape.num_candidates, inputs.banned, logits)
        values, token_ids = top.values, top.token_ids
        if logits is not None:
            logprobs = logits.sub_(top.log_sum_exp[:, None])
            values, token_ids = self._search.best_allowed(shape, (values, token_ids), logprobs, inputs)
        self._search.advance(shape, values, token_ids)

    def _run_encoder(self, num_tokens: int) -> None:
        self._encoder.run(PackedTokens(*self._packed[num_tokens].unbind(0)))

    def _padding(self, num_tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """int32[5, S] of padding tokens, in the order of PackedTokens."""
        spare_cell = (self._cache.num_source_slots - 1) * self._cache.max_source_tokens
        fields = (self._pad_token_id, self._pad_token_id, 0, 0, spare_cell)
        return np.repeat(np.array(fields, dtype=np.int32)[:, None], num_tokens, axis=1)

    def _lay_out(self, batch: EncodedBatch, num_tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """int32[5, S] in the order of PackedTokens. The k-th token of a sentence that is no pad: position row k + pad."""
        packed = self._padding(num_tokens)
        ids, offsets = batch.source_token_ids, batch.source_offsets
        total, lengths = len(ids), np.diff(offsets)
        is_token = ids != self._pad_token_id
        running = np.concatenate([[0], np.cumsum(is_token)])
        rank = running[1:] - np.repeat(running[offsets[:-1]], lengths)
        packed[0, :total] = ids
        packed[1, :total] = np.where(is_token, rank, 0) + self._pad_token_id
        packed[2, :total] = np.repeat(offsets[:-1], lengths)
        packed[3, :total] = np.repeat(offsets[1:], lengths)
        place = np.arange(total) - packed[2, :total]
        packed[4, :total] = np.repeat(batch.source_slots, lengths) * self._cache.max_source_tokens + place
        return packed


def load_runner(checkpoint: Path, engine_config: EngineConfig) -> DeviceRunner | Runner:
    """The runner for this device and model: kernels on a GPU, plain torch on a CPU and for head sizes the kernels lack."""
    if engine_config.device.startswith("cuda") and supports_kernels(ModelConfig.from_checkpoint(checkpoint)):
        return DeviceRunner.load(checkpoint, engine_config, progress=sys.stderr.isatty())
    return Runner.load(checkpoint, engine_config)


def size_buckets(largest: int, *, smallest: int = 1) -> tuple[int, ...]:
    """Sizes that steps are captured for: powers of two and halfway between, from 128 on in quarters; the last is `largest`,
    rounded up to a multiple of 16 from 16 on."""
    top = largest if largest < 16 else -(-largest // 16) * 16
    sizes = {1 << power for power in range(16)} | {3 << power for power in range(15)}
    sizes |= {quarters << power for power in range(5, 14) for quarters in (5, 7)}
    fitting = sorted(s for s in sizes if smallest <= s < top and (s < 16 or s % 16 == 0) and s != 6)
    return (*fitting, top)
