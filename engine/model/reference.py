"""The slow twin: NLLB-MoE's forward pass written straight from its equations, one sentence at a time, no cache.

Shares no code with `transformer`. Weights are a mapping from checkpoint names (without the `model.` prefix) to tensors; the
computation runs in their dtype (fp32, or fp64 as ground truth).
Legend: S source length, T target length, D d_model, V vocabulary, H heads, Dh head_dim, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import ModelConfig

Weights = Mapping[str, Tensor]


def reference_encode(weights: Weights, config: ModelConfig, source_ids: list[int]) -> Tensor:
    """Encoder output [S, D] after the final norm."""
    rows = []
    counted = 0
    for token in source_ids:
        counted += token != config.pad_token_id
        rows.append(config.pad_token_id + (counted if token != config.pad_token_id else 0))
    x = _embed(weights, config, source_ids, rows)
    visible = torch.ones(len(source_ids), len(source_ids), dtype=torch.bool)
    for layer in range(config.encoder_layers):
        prefix = f"encoder.layers.{layer}"
        y = _norm(weights, config, f"{prefix}.self_attn_layer_norm", x)
        x = x + _attention(weights, f"{prefix}.self_attn", y, y, visible, config.encoder_attention_heads)
        y = _norm(weights, config, f"{prefix}.ff_layer_norm", x)
        x = x + _feed_forward(weights, config, f"{prefix}.ffn", y, sparse=config.is_sparse("encoder", layer))
    return _norm(weights, config, "encoder.layer_norm", x)


def reference_logits(weights: Weights, config: ModelConfig, source_ids: list[int], target_ids: list[int]) -> Tensor:
    """Logits [T, V] after each prefix of target_ids (which start with the decoder start token).

    Positions follow the cached rule: token t is at row t + 1 + pad, a pad token at row pad.
    """
    pad = config.pad_token_id
    memory = reference_encode(weights, config, source_ids)
    rows = [pad if token == pad else t + 1 + pad for t, token in enumerate(target_ids)]
    x = _embed(weights, config, target_ids, rows)
    causal = torch.ones(len(target_ids), len(target_ids), dtype=torch.bool).tril()
    everything = torch.ones(len(target_ids), len(source_ids), dtype=torch.bool)
    heads = config.decoder_attention_heads
    for layer in range(config.decoder_layers):
        prefix = f"decoder.layers.{layer}"
        y = _norm(weights, config, f"{prefix}.self_attn_layer_norm", x)
        x = x + _attention(weights, f"{prefix}.self_attn", y, y, causal, heads)
        y = _norm(weights, config, f"{prefix}.cross_attention_layer_norm", x)
        x = x + _attention(weights, f"{prefix}.cross_attention", y, memory, everything, heads)
        y = _norm(weights, config, f"{prefix}.ff_layer_norm", x)
        x = x + _feed_forward(weights, config, f"{prefix}.ffn", y, sparse=config.is_sparse("decoder", layer))
    head = weights["shared.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return _norm(weights, config, "decoder.layer_norm", x) @ head.T


def _embed(weights: Weights, config: ModelConfig, token_ids: list[int], position_rows: list[int]) -> Tensor:
    table = weights["shared.weight"]
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    positions = torch.stack([_position(row, config.d_model, config.pad_token_id) for row in position_rows])
    return table[torch.tensor(token_ids)] * scale + positions.to(table.dtype)


def _position(row: int, d_model: int, pad_token_id: int) -> Tensor:
    """float32[D]: sin(row * f_j) for all j, then cos(row * f_j), f_j = 10000 ** (-j / (D // 2 - 1))."""
    if row == pad_token_id:
        return torch.zeros(d_model)
    half = d_model // 2
    frequencies = [math.exp(-j * math.log(10000) / (half - 1)) for j in range(half)]
    values = [math.sin(row * f) for f in frequencies] + [math.cos(row * f) for f in frequencies]
    return torch.tensor(values + [0.0] * (d_model % 2))


def _norm(weights: Weights, config: ModelConfig, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.pow(2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + config.layer_norm_eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _attention(weights: Weights, name: str, x: Tensor, context: Tensor, visible: Tensor, num_heads: int) -> Tensor:
    query = _linear(weights, f"{name}.q_proj", x)
    key = _linear(weights, f"{name}.k_proj", context)
    value = _linear(weights, f"{name}.v_proj", context)
    width = query.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].T / math.sqrt(width)
        probabilities = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        heads.append(probabilities @ value[:, part])
    return _linear(weights, f"{name}.out_proj", torch.cat(heads, dim=1))


def _feed_forward(weights: Weights, config: ModelConfig, name: str, x: Tensor, *, sparse: bool) -> Tensor:
    if not sparse:
        return _two_layers(weights, name, x)
    return torch.stack([_routed(weights, config, name, token) for token in x])


def _two_layers(weights: Weights, name: str, x: Tensor) -> Tensor:
    return _linear(weights, f"{name}.fc2", torch.relu(_linear(weights, f"{name}.fc1", x)))


def _routed(weights: Weights, config: ModelConfig, name: str, token: Tensor) -> Tensor:
    """One token [D] through its two most probable experts, gates renormalised, or the most probable one, gate = probability;
    outputs times 1 - moe_token_dropout."""
    router_logits = weights[f"{name}.router.classifier.weight"] @ token
    if config.router_bias:
        router_logits = router_logits + weights[f"{name}.router.classifier.bias"]
    probabilities = torch.softmax(router_logits, dim=-1)
    first = int(probabilities.argmax())
    if config.num_experts_per_tok == 1:
        gate = float(probabilities[first])
        return config.expert_output_scale * gate * _two_layers(weights, f"{name}.experts.expert_{first}", token)
    others = router_logits.clone()
    others[first] = -torch.inf
    second = int(others.argmax())
    total = max(float(probabilities[first] + probabilities[second]), torch.finfo(token.dtype).eps)
    output = torch.zeros_like(token)
    for expert in sorted((first, second)):
        gate = float(probabilities[expert]) / total
        output += config.expert_output_scale * gate * _two_layers(weights, f"{name}.experts.expert_{expert}", token)
    return output
