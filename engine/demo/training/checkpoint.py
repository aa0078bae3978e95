"""Training network <-> a checkpoint in the public NLLB-MoE format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.demo.training.network import Attention, DenseFeedForward, Layer, SparseFeedForward, TrainingNetwork


def named_views(network: TrainingNetwork) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, view of the network's parameter in the checkpoint's shape) for every stored tensor."""
    yield "model.shared.weight", network.embedding.data
    yield from _norm("model.encoder.layer_norm", network.encoder_norm)
    yield from _norm("model.decoder.layer_norm", network.decoder_norm)
    for stack, layers in (("encoder", network.encoder), ("decoder", network.decoder)):
        for index, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            yield from _layer(f"model.{stack}.layers.{index}", layer)


def _layer(prefix: str, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    yield from _attention(f"{prefix}.self_attn", layer.self_attn)
    yield from _norm(f"{prefix}.self_attn_layer_norm", layer.self_attn_norm)
    if layer.cross_attn is not None and layer.cross_attn_norm is not None:
        yield from _attention(f"{prefix}.cross_attention", layer.cross_attn)
        yield from _norm(f"{prefix}.cross_attention_layer_norm", layer.cross_attn_norm)
    yield from _norm(f"{prefix}.ff_layer_norm", layer.ff_norm)
    ff = layer.ff
    if isinstance(ff, SparseFeedForward):
        yield f"{prefix}.ffn.router.classifier.weight", ff.router.data
        for expert in range(ff.num_experts):
            yield from _feed_forward(f"{prefix}.ffn.experts.expert_{expert}", ff, expert)
    else:
        assert isinstance(ff, DenseFeedForward)
        yield from _feed_forward(f"{prefix}.ffn", ff, None)


def _feed_forward(prefix: str, ff: SparseFeedForward | DenseFeedForward, expert: int | None) -> Iterator[tuple[str, Tensor]]:
    index = expert or 0
    yield f"{prefix}.fc1.weight", ff.fc1_weight.data[index]
    yield f"{prefix}.fc1.bias", ff.fc1_bias.data if expert is None else ff.fc1_bias.data[index]
    yield f"{prefix}.fc2.weight", ff.fc2_weight.data[index].T
    yield f"{prefix}.fc2.bias", ff.fc2_bias.data if expert is None else ff.fc2_bias.data[index]


def _attention(prefix: str, attention: Attention) -> Iterator[tuple[str, Tensor]]:
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        yield f"{prefix}.{name}.weight", attention.qkv_weight.data[index]
        yield f"{prefix}.{name}.bias", attention.qkv_bias.data[index]
    yield f"{prefix}.out_proj.weight", attention.out_weight.data[0]
    yield f"{prefix}.out_proj.bias", attention.out_bias.data


def _norm(prefix: str, norm: nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.weight", norm.weight.data
    yield f"{prefix}.bias", norm.bias.data


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of `config`, with the fields that transformers 4.57.6 reads."""
    return {
        "architectures": ["NllbMoeForConditionalGeneration"],
        "model_type": "nllb-moe",
        "activation_function": "relu",
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "batch_prioritized_routing": False,
        "bos_token_id": config.bos_token_id,
        "d_model": config.d_model,
        "decoder_attention_heads": config.decoder_attention_heads,
        "decoder_ffn_dim": config.decoder_ffn_dim,
        "decoder_layerdrop": 0.0,
        "decoder_layers": config.decoder_layers,
        "decoder_sparse_step": config.decoder_sparse_step,
        "decoder_start_token_id": config.decoder_start_token_id,
        "dropout": 0.1,
        "dtype": "bfloat16",
        "encoder_attention_heads": config.encoder_attention_heads,
        "encoder_ffn_dim": config.encoder_ffn_dim,
        "encoder_layerdrop": 0.0,
        "encoder_layers": config.encoder_layers,
        "encoder_sparse_step": config.encoder_sparse_step,
        "eos_token_id": config.eos_token_id,
        "expert_capacity": 64,
        "is_encoder_decoder": True,
        "max_position_embeddings": config.max_position_embeddings,
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": config.moe_token_dropout,
        "normalize_router_prob_before_dropping": False,
        "num_experts": config.num_experts,
        "num_hidden_layers": config.encoder_layers,
        "pad_token_id": config.pad_token_id,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "scale_embedding": config.scale_embedding,
        "second_expert_policy": "all",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }


def write_checkpoint(network: TrainingNetwork, directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the network into `directory` (tokenizer files there are left alone); each file is replaced whole.

    Returns the number of parameters written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # `contiguous` copies only views that are not; clones keep safetensors from refusing shared storage
    tensors = {name: view.detach().to("cpu", dtype).contiguous().clone() for name, view in named_views(network)}
    temporary = directory / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(directory / "model.safetensors")
    config = network.config
    generation = {
        "bos_token_id": config.bos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "max_new_tokens": 200,
        "pad_token_id": config.pad_token_id,
    }
    for name, content in (("config.json", hf_config(config)), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


@torch.no_grad()
def read_checkpoint(network: TrainingNetwork, directory: Path) -> None:
    """Copy a checkpoint's weights into the network. Raises KeyError for a missing tensor, RuntimeError for a wrong shape."""
    stored = load_file(directory / "model.safetensors")
    for name, view in named_views(network):
        view.copy_(stored[name])
