"""The encoder through the kernels, over packed sentences, as launches that a CUDA graph can hold.

Legend: S packed tokens (padding to the graph's size included), D d_model, L decoder layers, P source slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.model.kernel_layers import KernelLayers, KernelOptions, Pending, normed
from engine.model.kernel_weights import (
    KernelDense,
    KernelExperts,
    KernelLinear,
    feed_forward_shapes,
    kernel_feed_forward,
    kernel_linear,
    linear_shape,
)
from engine.model.layers import LayerNorm
from engine.model.transformer import EncoderLayer, Transformer
from kernels.embed import embed
from kernels.encoder_attention import encoder_attention
from kernels.small_linear import small_linear


class PackedTokens(NamedTuple):
    """One value a token, int32[S] each. token_ids; position_rows: row of the position table; starts, ends: the packed range
    of the token's sentence (equal: padding); cells: slot * S_max + place in the sentence, where its cross-attention keys and
    values go (the spare slot for padding).
    """

    token_ids: Tensor
    position_rows: Tensor
    starts: Tensor
    ends: Tensor
    cells: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: LayerNorm
    qkv: KernelLinear
    out: KernelLinear
    ffn_norm: LayerNorm
    feed_forward: KernelDense | KernelExperts


class KernelEncoder:
    """The encoder of one Transformer, which ends by writing cross-attention keys and values into one cache.

    Norms are launches of their own: at an encoder's many rows they cost little beside the products, and the library's GEMM
    over raw rows would have to leave twice the bytes. cache must have one slot more than the engine uses: padding tokens
    write there.
    """

    def __init__(self, transformer: Transformer, cache: KVCache, *, max_tokens: int, options: KernelOptions) -> None:
        self._model = transformer
        self._cache = cache
        self._heads = transformer.config.encoder_attention_heads
        self._options = options
        self._layers = [_layer(layer) for layer in transformer.encoder_layers]
        self._cross_kv = _fused_cross_kv(transformer)
        shapes = set()
        for layer in self._layers:
            shapes |= {linear_shape(layer.qkv), linear_shape(layer.out)} | feed_forward_shapes(layer.feed_forward)
        self._kernels = KernelLayers(shapes, max_tokens, transformer.embedding, options)

    def run(self, tokens: PackedTokens) -> None:
        """Encode and write every decoder layer's keys and values; source_lengths are the caller's."""
        config = self._model.config
        x = embed(
            tokens.token_ids,
            None,
            self._model.embedding,
            self._model.positions,
            scale=math.sqrt(config.d_model) if config.scale_embedding else 1.0,
            pad_token_id=config.pad_token_id,
            position_rows=tokens.position_rows,
        )
        active = tokens.starts < tokens.ends
        pending: Pending | None = None
        for layer in self._layers:
            qkv = self._kernels.linear(normed(x, pending, layer.attention_norm), layer.qkv)
            context = encoder_attention(qkv, tokens.starts, tokens.ends, num_heads=self._heads)
            self._kernels.linear(context, layer.out, residual=x)
            pending = self._kernels.feed_forward(x, layer.ffn_norm, layer.feed_forward, active)
        memory = normed(x, pending, self._model.encoder_norm)
        self._write(small_linear(memory, *self._cross_kv, fixed=self._options.fixed_order), tokens.cells)

    def _write(self, key_values: Tensor, cells: Tensor) -> None:
        """key_values [S, L * 2D], cells int32[S] -> the cross-attention cache of every layer."""
        layers, slots, length = self._cache.cross_kv.shape[:3]
        places = self._cache.cross_kv.view(layers, slots * length, -1)
        values = key_values.view(cells.shape[0], layers, -1).transpose(0, 1)
        # eight bytes an element: torch copies one element a thread, four times slower in 16-bit ones
        places.view(torch.int64).index_copy_(1, cells.long(), values.view(torch.int64))


def _layer(layer: EncoderLayer) -> _Layer:
    return _Layer(
        attention_norm=layer.self_attention_norm,
        qkv=kernel_linear(layer.self_attention.qkv),
        out=kernel_linear(layer.self_attention.out),
        ffn_norm=layer.feed_forward_norm,
        feed_forward=kernel_feed_forward(layer.feed_forward),
    )


def _fused_cross_kv(transformer: Transformer) -> KernelLinear:
    """The key/value projections of all decoder layers as one map [L * 2D, D]; the layers keep views of it, so the weights
    exist once."""
    linears = [layer.cross_attention.key_value for layer in transformer.decoder_layers]
    weight = torch.cat([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    bias = torch.cat([b for b in biases if b is not None])
    for index, linear in enumerate(linears):
        rows = linear.weight.shape[0]
        linear.weight = weight[index * rows : (index + 1) * rows]
        linear.bias = bias[index * rows : (index + 1) * rows]
    return KernelLinear(weight, bias)
