"""This project's engine in the benchmark, driven through Runner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batching import pack
from engine.bench.engine_run import EngineRun, synchronize
from engine.bench.inputs import CellInputs
from engine.bench.shapes import Cell, Variant
from engine.config import EngineConfig
from engine.model.transformer import Transformer
from engine.runner import Runner
from engine.search.spec import ScoredTokens, SearchOutcome, SearchSpec
from engine.step_clock import StepClock
from engine.types import EncodedBatch, SearchOptions

if TYPE_CHECKING:
    from engine.device_runner import DeviceRunner

_STEPS_OF_GRACE = 8  # a device engine may report a finished sentence a step or two late


def engine_config(
    cells: Sequence[Cell], *, device: str, variant: Variant, source_tokens: int, target_tokens: int, num_threads: int
) -> EngineConfig:
    """Limits that just hold the largest of `cells`."""
    slots = max(cell.batch for cell in cells)
    return EngineConfig(
        device=device,
        precision=variant.precision,
        max_rows=max(cell.rows for cell in cells),
        max_source_slots=slots,
        max_source_tokens=source_tokens,
        max_target_tokens=target_tokens,
        encode_token_budget=slots * source_tokens,
        num_threads=num_threads,
        batch_invariant=variant.batch_invariant,
        int8_dense=variant.int8_dense,
    )


def make_runner(transformer: Transformer, config: EngineConfig, clock: StepClock | None = None) -> Runner | DeviceRunner:
    """The runner that a service would get for this device, warmed up. clock: times the passes of a device runner."""
    if not config.device.startswith("cuda"):
        return Runner(transformer, config)
    from engine.device_runner import DeviceRunner, supports_kernels

    if not supports_kernels(transformer.config):
        return Runner(transformer, config)
    runner = DeviceRunner(transformer, config, clock)
    runner.warm_up()
    return runner


class OurEngine:
    """A Runner and how to give it one cell."""

    def __init__(self, runner: Runner | DeviceRunner, config: EngineConfig) -> None:
        self.runner = runner
        self.config = config
        self._device = torch.device(config.device)

    def run(self, inputs: CellInputs) -> EngineRun:
        """Encode and decode the whole batch, timed as one; then the encoder pass alone."""
        batch = self._batch(inputs)
        synchronize(self._device)
        start = time.perf_counter()
        self.runner.encode(batch)
        outcomes = self.decode(inputs)
        synchronize(self._device)
        total_s = time.perf_counter() - start
        self.runner.encode(batch)
        synchronize(self._device)
        encode_s = time.perf_counter() - start - total_s
        best = _in_order(outcomes, inputs)
        token_ids = np.array([hypothesis.token_ids for hypothesis in best], dtype=np.int32)
        scores = tuple(hypothesis.score for hypothesis in best)
        return EngineRun(token_ids, total_s, encode_s, inputs.num_steps, scores)

    def encode(self, inputs: CellInputs) -> None:
        """The encoder pass alone; `decode` may follow."""
        self.runner.encode(self._batch(inputs))

    def decode(self, inputs: CellInputs) -> list[SearchOutcome]:
        """Decode what was encoded until every sentence is back."""
        self.start(inputs)
        outcomes: list[SearchOutcome] = []
        for _ in range(inputs.num_steps + _STEPS_OF_GRACE):
            outcomes += self.runner.decode()
            if len(outcomes) == inputs.cell.batch:
                return outcomes
        self.runner.clear()
        raise RuntimeError(
            f"{inputs.cell}: {len(outcomes)} of {inputs.cell.batch} sentences came back after {inputs.num_steps} steps"
        )

    def start(self, inputs: CellInputs) -> None:
        """Begin decoding what was encoded; no step yet."""
        cell = inputs.cell
        options = SearchOptions(
            beam_size=cell.beam, max_target_tokens=inputs.target_tokens, min_target_tokens=inputs.target_tokens
        )
        self.runner.start(
            [
                SearchSpec(
                    source_slot=slot,
                    beam_rows=tuple(range(slot * cell.beam, (slot + 1) * cell.beam)),
                    forced_token_id=int(forced),
                    max_tokens=inputs.target_tokens,
                    options=options,
                )
                for slot, forced in enumerate(inputs.forced_token_ids)
            ]
        )

    @staticmethod
    def _batch(inputs: CellInputs) -> EncodedBatch:
        return pack(list(inputs.source_token_ids), range(inputs.cell.batch))


def _in_order(outcomes: Sequence[SearchOutcome], inputs: CellInputs) -> list[ScoredTokens]:
    """Best hypotheses in the order of the sentences."""
    for outcome in outcomes:
        if outcome.failure is not None:
            raise RuntimeError(f"{inputs.cell}: sentence {outcome.source_slot} failed: {outcome.failure}")
    return [outcome.hypotheses[0] for outcome in sorted(outcomes, key=lambda outcome: outcome.source_slot)]
