"""Key/value cache of the decoder: self-attention by (row, position), cross-attention by source slot.

Legend: L decoder layers, N cache rows, T_max target positions, P source slots, S_max source length, H heads, Dh head_dim.

Beams never copy self-attention entries. A cell (row, position) is written once per sentence; each live row carries an
*ancestry*: the cache row that holds the key and value of each earlier position of its hypothesis. Cross-attention
keys and values are written once per sentence into its source slot and shared by its beams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.config import ModelConfig

LENGTH_STEP = 16  # attention on the CPU reads sources in steps of this many tokens


@dataclass(frozen=True, slots=True)
class KVCache:
    """Preallocated, zero-filled (masked cells must hold finite numbers).

    self_kv [L, N, T_max, 2, H, Dh] and cross_kv [L, P, S_max, 2, H, Dh]: index 0 of the fourth axis is the key, 1 the
    value. source_lengths int32[P]: tokens of the sentence in each slot.
    """

    self_kv: Tensor
    cross_kv: Tensor
    source_lengths: Tensor

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        num_rows: int,
        max_target_tokens: int,
        num_source_slots: int,
        max_source_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Allocate zeros for the limits given; max_source_tokens is rounded up to a multiple of LENGTH_STEP.

        Raises ValueError for a limit below 1.
        """
        limits = {
            "num_rows": num_rows,
            "max_target_tokens": max_target_tokens,
            "num_source_slots": num_source_slots,
            "max_source_tokens": max_source_tokens,
        }
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        heads = config.decoder_attention_heads
        head_shape = (2, heads, config.d_model // heads)
        layers = config.decoder_layers
        max_source_tokens = -(-max_source_tokens // LENGTH_STEP) * LENGTH_STEP
        return cls(
            self_kv=torch.zeros((layers, num_rows, max_target_tokens, *head_shape), dtype=dtype, device=device),
            cross_kv=torch.zeros((layers, num_source_slots, max_source_tokens, *head_shape), dtype=dtype, device=device),
            source_lengths=torch.zeros(num_source_slots, dtype=torch.int32, device=device),
        )

    @property
    def num_rows(self) -> int:
        """N: live hypotheses that fit."""
        return self.self_kv.shape[1]

    @property
    def max_target_tokens(self) -> int:
        """T_max: decoder positions, the start token included."""
        return self.self_kv.shape[2]

    @property
    def num_source_slots(self) -> int:
        """P: sentences that fit."""
        return self.cross_kv.shape[1]

    @property
    def max_source_tokens(self) -> int:
        """S_max: longest source that fits."""
        return self.cross_kv.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in (self.self_kv, self.cross_kv, self.source_lengths))

    def self_cells(self, layer: int) -> Tensor:
        """View [N * T_max, 2 * H * Dh] of one layer: cell (row, position) is at row * T_max + position."""
        return self.self_kv[layer].view(self.num_rows * self.max_target_tokens, -1)

    def cross_cells(self, layer: int) -> Tensor:
        """View [P * S_max, 2 * H * Dh] of one layer: cell (slot, source position) is at slot * S_max + position."""
        return self.cross_kv[layer].view(self.num_source_slots * self.max_source_tokens, -1)
