"""All device work behind one class: weights, KV cache, search state. The host decides, the runner computes.

Legend: B sentences, S_total packed source tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.expert_load import ExpertLoadMeter
from engine.kv_cache import KVCache
from engine.model.transformer import Transformer
from engine.search.search import Search
from engine.search.spec import SearchOutcome, SearchSpec
from engine.types import EncodedBatch, ExpertLoad, Int32Array
from engine.weights.loading import load_transformer


class Runner:
    """Runs encoder passes and decode steps for one Transformer on one device. Not thread-safe: one thread calls it."""

    def __init__(self, transformer: Transformer, engine_config: EngineConfig) -> None:
        config = transformer.config
        self._device = torch.device(engine_config.device)
        self._transformer = transformer
        self._expert_load = ExpertLoadMeter(transformer.encoder_load, transformer.decoder_load)
        self._cache = KVCache.allocate(
            config,
            num_rows=engine_config.max_rows,
            max_target_tokens=engine_config.max_target_tokens,
            num_source_slots=engine_config.max_source_slots,
            max_source_tokens=engine_config.max_source_tokens,
            dtype=transformer.dtype,
            device=self._device,
        )
        self._search = Search(
            num_rows=engine_config.max_rows,
            max_target_tokens=engine_config.max_target_tokens,
            start_token_id=config.decoder_start_token_id,
            eos_token_id=config.eos_token_id,
            device=self._device,
        )

    @classmethod
    def load(cls, checkpoint: Path, engine_config: EngineConfig) -> Self:
        """Load the weights. Sets torch's threads for this process: Ray and others export OMP_NUM_THREADS=1."""
        torch.set_num_threads(engine_config.num_threads)
        return cls(load_transformer(checkpoint, engine_config), engine_config)

    @property
    def expert_loads(self) -> tuple[ExpertLoad, ...]:
        """See EngineStats."""
        return self._expert_load.loads

    @torch.inference_mode()
    def encode(self, batch: EncodedBatch) -> None:
        """Encoder pass; the sentences' cross-attention keys and values go to their source slots."""
        offsets = self._to_device(batch.source_offsets)
        memory = self._transformer.encode(self._to_device(batch.source_token_ids), offsets)
        self._transformer.write_cross_kv(memory, offsets, self._to_device(batch.source_slots), self._cache)
        self._expert_load.encoded()

    @torch.inference_mode()
    def start(self, specs: Sequence[SearchSpec]) -> None:
        """Begin decoding sentences that are encoded."""
        self._search.add(specs)

    @torch.inference_mode()
    def decode(self) -> list[SearchOutcome]:
        """One decode step for all live rows, of which there must be some. Returns the sentences it finished."""
        inputs = self._search.inputs()
        logits = self._transformer.decode(*inputs, self._cache)
        self._expert_load.decoded()
        return self._search.advance(logits)

    @torch.inference_mode()
    def remove(self, source_slots: Collection[int]) -> None:
        """Stop decoding the sentences of these slots; slots that are not decoding are ignored."""
        self._search.remove(source_slots)

    def clear(self) -> None:
        """Stop decoding every sentence; touches no device memory, so it works after a device fault."""
        self._search.clear()

    def _to_device(self, array: Int32Array) -> Tensor:
        return torch.from_numpy(array).to(self._device, torch.int64)
