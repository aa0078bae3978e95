"""The NLLB-MoE network at inference: encode packed sources, write cross-attention keys and values, decode one step.

Legend: S_total packed source tokens, B sentences, D d_model, R rows (live hypotheses), T positions, V vocabulary.
Pre-norm blocks; x = W[token] * sqrt(D) + position row; logits = h W^T, with the same W where the model ties them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import ModelConfig
from engine.kv_cache import KVCache
from engine.model.attention import CrossAttention, DecodePlan, SelfAttention
from engine.model.layers import DenseFeedForward, LayerNorm, Linear, clamp_overflow
from engine.model.mixture_of_experts import MixtureOfExperts, StackLoad


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """x += SelfAttention(norm(x)); x += FeedForward(norm(x))."""

    self_attention_norm: LayerNorm
    self_attention: SelfAttention
    feed_forward_norm: LayerNorm
    feed_forward: DenseFeedForward | MixtureOfExperts

    def pack(self) -> None:
        """See Linear.pack."""
        self.self_attention.pack()
        self.feed_forward.pack()

    def __call__(self, x: Tensor, lengths: list[int]) -> Tensor:
        """x [S_total, D] of sentences with `lengths` -> [S_total, D]."""
        x = x + self.self_attention.encode(self.self_attention_norm(x), lengths)
        return clamp_overflow(x + self.feed_forward(self.feed_forward_norm(x)))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """x += SelfAttention(norm(x)); x += CrossAttention(norm(x), source); x += FeedForward(norm(x))."""

    self_attention_norm: LayerNorm
    self_attention: SelfAttention
    cross_attention_norm: LayerNorm
    cross_attention: CrossAttention
    feed_forward_norm: LayerNorm
    feed_forward: DenseFeedForward | MixtureOfExperts

    def pack(self) -> None:
        """See Linear.pack."""
        self.self_attention.pack()
        self.cross_attention.pack()
        self.feed_forward.pack()

    def __call__(self, x: Tensor, plan: DecodePlan, cache: KVCache, layer: int) -> Tensor:
        """x [R, D], one new position per row -> [R, D]; writes the rows' keys and values of this layer."""
        x = x + self.self_attention.decode(self.self_attention_norm(x), plan, cache.self_cells(layer))
        x = x + self.cross_attention.decode(self.cross_attention_norm(x), plan, cache.cross_kv[layer])
        return clamp_overflow(x + self.feed_forward(self.feed_forward_norm(x)))


@dataclass(frozen=True, slots=True)
class Transformer:
    """Weights and the three passes over them. Every call runs without autograd.

    embedding [V padded to a multiple of 64, D], zero in the padding. output_projection: a linear map of that size without
    bias, with the embedding's weights where `tie_word_embeddings`. positions [rows, D]: the sinusoidal table. encoder_load,
    decoder_load: what the newest `encode` and `decode` gave to the experts. After filling the weights call `pack` once.
    """

    config: ModelConfig
    embedding: Tensor
    output_projection: Linear
    positions: Tensor
    encoder_layers: tuple[EncoderLayer, ...]
    encoder_norm: LayerNorm
    decoder_layers: tuple[DecoderLayer, ...]
    decoder_norm: LayerNorm
    encoder_load: StackLoad
    decoder_load: StackLoad

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def max_tokens(self) -> int:
        """Longest source or target (start token included) that the position table covers."""
        return self.positions.shape[0] - self.config.pad_token_id - 1

    def pack(self) -> None:
        """Bring all plain linear maps into the fastest layout of their device; weights must not be written afterwards."""
        self.output_projection.pack()
        for encoder_layer in self.encoder_layers:
            encoder_layer.pack()
        for decoder_layer in self.decoder_layers:
            decoder_layer.pack()

    @torch.inference_mode()
    def encode(self, source_token_ids: Tensor, source_offsets: Tensor) -> Tensor:
        """Run the encoder over packed sentences. int64[S_total], int64[B + 1] -> memory [S_total, D], final-normed.

        Sentence b is tokens source_offsets[b] to source_offsets[b + 1]; none may be empty.
        """
        lengths = source_offsets.diff().tolist()
        if not lengths or min(lengths) < 1:
            raise ValueError(f"source lengths are {lengths}; encode needs at least one sentence and no empty one")
        if max(lengths) > self.max_tokens:
            raise ValueError(f"a source has {max(lengths)} tokens; the position table covers {self.max_tokens}")
        x = self._embed(source_token_ids, self._source_positions(source_token_ids, source_offsets))
        for layer in self.encoder_layers:
            x = layer(x, lengths)
        return self.encoder_norm(x)

    @torch.inference_mode()
    def write_cross_kv(self, memory: Tensor, source_offsets: Tensor, source_slots: Tensor, cache: KVCache) -> None:
        """Write keys and values of memory [S_total, D] into the slots int64[B] and set their source_lengths.

        The slots are zeroed first: masked cells must be finite, whatever the sentence before left there.
        Raises ValueError when a sentence is longer than the cache's slots.
        """
        lengths = source_offsets.diff()
        if int(lengths.max()) > cache.max_source_tokens:
            raise ValueError(f"a source has {int(lengths.max())} tokens; a cache slot holds {cache.max_source_tokens}")
        cache.cross_kv.index_fill_(1, source_slots, 0.0)
        starts = source_slots * cache.max_source_tokens - source_offsets[:-1]
        cells = torch.arange(memory.shape[0], device=memory.device) + starts.repeat_interleave(lengths)
        for index, layer in enumerate(self.decoder_layers):
            cache.cross_cells(index).index_copy_(0, cells, layer.cross_attention.key_value(memory))
        cache.source_lengths[source_slots] = lengths.to(torch.int32)

    @torch.inference_mode()
    def decode(
        self,
        token_ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        source_slots: Tensor,
        ancestry: Tensor,
        cache: KVCache,
    ) -> Tensor:
        """One decoder step for R rows of any sentences at any positions -> logits float32[R, V].

        token_ids int64[R]: the newest token of each row. positions int64[R]: its position from 0 (the start token's).
        rows int64[R]: the cache row written at that position. source_slots int64[R]: the row's sentence.
        ancestry int64[R, T], T > max(positions): the cache row of every position t <= positions[r]; its entry at
        positions[r] is rows[r]; later entries may be any valid row and are masked.
        """
        plan = DecodePlan.build(positions, rows, source_slots, ancestry, cache)
        x = self._embed(token_ids, self._target_positions(token_ids, positions))
        for index, layer in enumerate(self.decoder_layers):
            x = layer(x, plan, cache, index)
        return self.output_projection(self.decoder_norm(x))[:, : self.config.vocab_size].float()

    def _embed(self, token_ids: Tensor, position_rows: Tensor) -> Tensor:
        x = self.embedding.index_select(0, token_ids)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        return x + self.positions.index_select(0, position_rows)

    def _source_positions(self, token_ids: Tensor, offsets: Tensor) -> Tensor:
        """The k-th non-pad token of a sentence (k from 1) is at row k + pad; a pad token at row pad."""
        pad = self.config.pad_token_id
        counted = token_ids != pad
        running = functional.pad(counted.cumsum(0), (1, 0))
        before = running[offsets[:-1]].repeat_interleave(offsets.diff())
        return torch.where(counted, running[1:] - before, 0) + pad

    def _target_positions(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The rule of cached generation: row position + 1 + pad, pad tokens counted; a pad token itself at row pad."""
        pad = self.config.pad_token_id
        return torch.where(token_ids == pad, pad, positions + (1 + pad))
