"""One decoder step through the kernels, as a sequence of launches that a CUDA graph can hold.

Legend: R entries (live hypotheses and start tokens), G groups (runs of entries of one sentence), D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.model.kernel_layers import KernelLayers, KernelOptions, Pending, normed, normed_int8
from engine.model.kernel_weights import (
    KernelDense,
    KernelExperts,
    KernelLinear,
    feed_forward_shapes,
    folded_linear,
    kernel_feed_forward,
    kernel_linear,
    linear_shape,
)
from engine.model.layers import LayerNorm
from engine.model.transformer import DecoderLayer, Transformer
from kernels.beam_search import StepInputs
from kernels.decode_attention import decode_cross_attention, decode_self_attention, lists_from
from kernels.embed import embed
from kernels.head_topk import TopTokens, fixed_tiles, head_topk, row_logits, select_tiles
from kernels.history_lists import HistoryLists
from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.quantized_rows import QuantizedRows
from kernels.small_linear import qkv_linear


class EntryGroups(NamedTuple):
    """Runs of entries of one source slot, int32[G] each; count 0: unused."""

    slots: Tensor
    starts: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    self_norm: LayerNorm
    qkv: KernelLinear
    self_out: KernelLinear
    cross_norm: LayerNorm
    query: KernelLinear
    cross_out: KernelLinear
    ffn_norm: LayerNorm
    feed_forward: KernelDense | KernelExperts


class KernelDecoder:
    """The decoder of one Transformer over one KV cache.

    It folds the layer norms into the maps behind them and gives up the plain weights of those, and in int8 those of an
    output projection of its own: afterwards the Transformer's own `decode` fails.
    """

    def __init__(self, transformer: Transformer, cache: KVCache, *, max_entries: int, options: KernelOptions) -> None:
        self._model = transformer
        self._cache = cache
        self._heads = transformer.config.decoder_attention_heads
        self._options = options
        self._layers = [_layer(layer, options) for layer in transformer.decoder_layers]
        shapes = {linear_shape(linear) for layer in self._layers for linear in (layer.qkv, layer.self_out, layer.query)}
        for layer in self._layers:
            shapes |= {linear_shape(layer.cross_out)} | feed_forward_shapes(layer.feed_forward)
        self._kernels = KernelLayers(shapes, max_entries, transformer.embedding, options, keep_statistics=True)
        self._head: Tensor | Int8Linear = transformer.output_projection.weight
        if options.int8_dense:
            self._head = quantize_int8(self._head)
            if not transformer.config.tie_word_embeddings:  # else its rows are looked up still
                transformer.output_projection.weight = transformer.output_projection.weight.to("meta")

    @property
    def lists_from(self) -> int | None:
        """The least number of entries of a step that `hidden` wants history lists for; None: it takes none."""
        if self._options.fixed_order:  # bits of an entry would depend on its mates' histories
            return None
        config = self._model.config
        head_dim = config.d_model // self._heads
        return lists_from(self._heads, head_dim, self._model.dtype, self._cache.self_kv.device)

    def hidden(
        self,
        inputs: StepInputs,
        groups: EntryGroups,
        ancestry: Tensor,
        *,
        lists: HistoryLists | None = None,
        usual_groups: int | None = None,
    ) -> Tensor | QuantizedRows:
        """Final-normed hidden states [R, D] of every entry, in the form that the head takes; writes their keys and values.
        ancestry int32[rows, T + 1]; lists: of these entries, from `lists_from` of them on; usual_groups: how many groups are
        in use as a rule (see `decode_cross_attention`).
        """
        config = self._model.config
        # Self-attention of the first layer reads inputs and lists before it waits, beside the map before it, which lets it
        # start before it waits itself. Their launch, `step_inputs`, is over by then, because this one comes between: it
        # waits for `step_inputs` before it lets the map start. Were both one launch, that would be a race.
        x = embed(
            inputs.token_ids,
            inputs.positions,
            self._model.embedding,
            self._model.positions,
            scale=math.sqrt(config.d_model) if config.scale_embedding else 1.0,
            pad_token_id=config.pad_token_id,
            statistics=self._kernels.statistics,
        )
        pending: Pending | None = None
        for index, layer in enumerate(self._layers):
            pending = self._run(layer, index, x, pending, inputs, groups, ancestry, lists, usual_groups)
        if isinstance(self._head, Int8Linear):  # fastest at every number of rows (kernels/README.md)
            return normed_int8(x, pending, self._model.decoder_norm)
        return normed(x, pending, self._model.decoder_norm)

    def top_tokens(self, hidden: Tensor | QuantizedRows, k: int, banned: Tensor, logits: Tensor | None = None) -> TopTokens:
        """The k best next tokens of every entry; banned int32[R]: one token that may not be chosen (-1: none). logits
        float32[R, V]: for logit rules that need to see every token, filled; the result's values are of the same logits.
        """
        vocab_size, bits = self._model.config.vocab_size, 8 if isinstance(self._head, Int8Linear) else 16
        rows, features = hidden.shape
        dtype = hidden.codes.dtype if isinstance(hidden, QuantizedRows) else hidden.dtype
        tiles = None
        if self._options.fixed_order:
            tiles = fixed_tiles(features, vocab_size, bits, hidden.device, dtype)
        if logits is None:
            return head_topk(hidden, self._head, k=k, vocab_size=vocab_size, banned=banned, tiles=tiles)
        tiles = tiles or select_tiles(rows, features, vocab_size, bits, hidden.device, dtype)
        tiles = replace(tiles, gated=False)  # gated tiles leave out what cannot be among the best
        scratch = torch.empty_like(logits)
        top = head_topk(hidden, self._head, k=k, vocab_size=vocab_size, banned=banned, logits_scratch=scratch, tiles=tiles)
        row_logits(scratch, logits, tiles)
        return top

    def _run(
        self,
        layer: _Layer,
        index: int,
        x: Tensor,
        pending: Pending | None,
        inputs: StepInputs,
        groups: EntryGroups,
        ancestry: Tensor,
        lists: HistoryLists | None,
        usual_groups: int | None,
    ) -> Pending | None:
        """x [R, D] in place; expert outputs of this layer are left pending."""
        cells = self._cache.self_kv[index]
        query = qkv_linear(
            self._kernels.settle(x, pending, layer.self_norm, layer.qkv),
            *layer.qkv,
            cells,
            inputs.rows,
            inputs.positions,
            fixed=self._options.fixed_order,
            scratch=self._kernels.scratch,
            statistics=self._kernels.statistics,
        )
        context = decode_self_attention(
            query,
            cells,
            ancestry,
            inputs.rows,
            inputs.positions,
            num_heads=self._heads,
            history_ready=True,  # but for a start token fed in this very step, which the kernel waits for
            lists=lists,
            usual_groups=usual_groups,
        )
        self._kernels.linear(context, layer.self_out, residual=x)
        query = self._kernels.linear(self._kernels.settle(x, None, layer.cross_norm, layer.query), layer.query)
        context = decode_cross_attention(
            query,
            self._cache.cross_kv[index],
            self._cache.source_lengths,
            *groups,
            num_heads=self._heads,
            source_ready=True,
            usual_groups=usual_groups,
        )
        products = self._kernels.products_for(layer.feed_forward)
        ahead = self._kernels.ahead_of(layer.feed_forward, x.shape[0])
        self._kernels.linear(context, layer.cross_out, residual=x, products=products, ahead=ahead)
        return self._kernels.feed_forward(x, layer.ffn_norm, layer.feed_forward, inputs.active, products)


def _layer(layer: DecoderLayer, options: KernelOptions) -> _Layer:
    int8 = options.int8_dense
    return _Layer(
        self_norm=layer.self_attention_norm,
        qkv=folded_linear(layer.self_attention.qkv, layer.self_attention_norm, int8=int8),
        self_out=kernel_linear(layer.self_attention.out),
        cross_norm=layer.cross_attention_norm,
        query=folded_linear(layer.cross_attention.query, layer.cross_attention_norm),
        cross_out=kernel_linear(layer.cross_attention.out),
        ffn_norm=layer.feed_forward_norm,
        feed_forward=kernel_feed_forward(layer.feed_forward, fold=layer.feed_forward_norm, int8=int8),
    )
