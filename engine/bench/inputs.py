"""Inputs of one cell: random sentences of equal length, each with a first target token of its own. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.bench.shapes import SOURCE_TOKENS, TARGET_TOKENS, Cell
from engine.config import ModelConfig
from engine.types import Int32Array

NUM_RESERVED_IDS = 4  # bos, pad, eos, unk


@dataclass(frozen=True, slots=True)
class CellInputs:
    """source_token_ids int32[B, S], eos last; forced_token_ids int32[B]; every sentence generates `target_tokens` tokens."""

    cell: Cell
    source_token_ids: Int32Array
    forced_token_ids: Int32Array
    target_tokens: int = TARGET_TOKENS

    @classmethod
    def draw(
        cls,
        config: ModelConfig,
        cell: Cell,
        *,
        forced_choices: tuple[int, ...] = (),
        source_tokens: int = SOURCE_TOKENS,
        seed: int = 0,
    ) -> CellInputs:
        """Uniform ids. forced_choices: the language tokens of a trained model; empty: any ordinary token."""
        generator = np.random.default_rng([seed, cell.batch, cell.beam])
        sources = generator.integers(NUM_RESERVED_IDS, config.vocab_size, (cell.batch, source_tokens))
        sources[:, -1] = config.eos_token_id
        if forced_choices:
            forced = generator.choice(forced_choices, cell.batch)
        else:
            forced = generator.integers(NUM_RESERVED_IDS, config.vocab_size, cell.batch)
        return cls(cell, sources.astype(np.int32), forced.astype(np.int32))

    @property
    def num_steps(self) -> int:
        """Decoder calls: the first one takes the start token and the forced token together."""
        return self.target_tokens - 1
