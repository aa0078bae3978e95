"""Allocate a Transformer's tensors, uninitialised, for a loader to fill.

Legend: D d_model, F feed-forward width, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.accounting import Stack
from engine.config import ModelConfig, QuantScheme
from engine.model.attention import CrossAttention, SelfAttention
from engine.model.layers import DenseFeedForward, LayerNorm, Linear, sinusoidal_positions
from engine.model.mixture_of_experts import MixtureOfExperts, Router, StackLoad
from engine.model.transformer import DecoderLayer, EncoderLayer, Transformer
from engine.quantization.cpu_experts import allocate_expert_stack
from engine.quantization.expert_stack import ExpertStack

_VOCABULARY_ALIGNMENT = 64  # rows of the output projection: GPU matmuls want aligned widths


def allocate_transformer(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device, scheme: QuantScheme | None, max_tokens: int
) -> Transformer:
    """Transformer with uninitialised weights (its position table is complete).

    max_tokens: longest source or target, the start token included. scheme: how expert matrices are stored.
    """
    return _Allocator(config, dtype, device, scheme).transformer(max_tokens)


@dataclass(frozen=True, slots=True)
class _Allocator:
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    scheme: QuantScheme | None

    def transformer(self, max_tokens: int) -> Transformer:
        config = self.config
        encoder_load, decoder_load = self._load("encoder"), self._load("decoder")
        padded_vocabulary = -(-config.vocab_size // _VOCABULARY_ALIGNMENT) * _VOCABULARY_ALIGNMENT
        embedding = self._empty(padded_vocabulary, config.d_model)
        head = embedding if config.tie_word_embeddings else torch.empty_like(embedding)
        embedding[config.vocab_size :] = head[config.vocab_size :] = 0.0
        table = sinusoidal_positions(max_tokens + config.pad_token_id + 1, config.d_model, config.pad_token_id)
        return Transformer(
            config=config,
            embedding=embedding,
            output_projection=Linear(head, None),
            positions=table.to(device=self.device, dtype=self.dtype),
            encoder_layers=tuple(self._encoder_layer(i, encoder_load) for i in range(config.encoder_layers)),
            encoder_norm=self._norm(),
            decoder_layers=tuple(self._decoder_layer(i, decoder_load) for i in range(config.decoder_layers)),
            decoder_norm=self._norm(),
            encoder_load=encoder_load,
            decoder_load=decoder_load,
        )

    def _load(self, stack: Stack) -> StackLoad:
        layers = self.config.encoder_layers if stack == "encoder" else self.config.decoder_layers
        sparse = tuple(layer for layer in range(layers) if self.config.is_sparse(stack, layer))
        return StackLoad.allocate(sparse, self.config.num_experts, self.device)

    def _encoder_layer(self, layer: int, load: StackLoad) -> EncoderLayer:
        return EncoderLayer(
            self_attention_norm=self._norm(),
            self_attention=self._self_attention(self.config.encoder_attention_heads),
            feed_forward_norm=self._norm(),
            feed_forward=self._feed_forward("encoder", layer, self.config.encoder_ffn_dim, load),
        )

    def _decoder_layer(self, layer: int, load: StackLoad) -> DecoderLayer:
        heads = self.config.decoder_attention_heads
        d_model = self.config.d_model
        cross = CrossAttention(
            self._linear(d_model, d_model), self._linear(2 * d_model, d_model), self._linear(d_model, d_model), heads
        )
        return DecoderLayer(
            self_attention_norm=self._norm(),
            self_attention=self._self_attention(heads),
            cross_attention_norm=self._norm(),
            cross_attention=cross,
            feed_forward_norm=self._norm(),
            feed_forward=self._feed_forward("decoder", layer, self.config.decoder_ffn_dim, load),
        )

    def _self_attention(self, heads: int) -> SelfAttention:
        d_model = self.config.d_model
        return SelfAttention(self._linear(3 * d_model, d_model), self._linear(d_model, d_model), heads)

    def _feed_forward(self, stack: Stack, layer: int, width: int, load: StackLoad) -> DenseFeedForward | MixtureOfExperts:
        d_model, experts = self.config.d_model, self.config.num_experts
        if not self.config.is_sparse(stack, layer):
            return DenseFeedForward(self._linear(width, d_model), self._linear(d_model, width))
        router_bias = self._empty(experts, dtype=torch.float32) if self.config.router_bias else None
        classifier = Linear(self._empty(experts, d_model, dtype=torch.float32), router_bias)
        return MixtureOfExperts(
            router=Router(classifier, self.config.num_experts_per_tok),
            fc1=self._experts(width, d_model, stack),
            fc1_bias=self._empty(experts, width),
            fc2=self._experts(d_model, width, stack),
            fc2_bias=self._empty(experts, d_model),
            output_scale=self.config.expert_output_scale,
            tokens_per_expert=load.row(layer),
        )

    def _experts(self, out_features: int, in_features: int, stack: Stack) -> ExpertStack:
        shape = (self.config.num_experts, out_features, in_features)
        return allocate_expert_stack(*shape, self.dtype, self.device, self.scheme, many_tokens=stack == "encoder")

    def _linear(self, out_features: int, in_features: int) -> Linear:
        return Linear(self._empty(out_features, in_features), self._empty(out_features))

    def _norm(self) -> LayerNorm:
        return LayerNorm(self._empty(self.config.d_model), self._empty(self.config.d_model), self.config.layer_norm_eps)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
