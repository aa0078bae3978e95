"""Tiny random NLLB-MoE checkpoints in the HF format, for tests.

Weights are drawn with a large spread (logit rms near 2), so that a wrong gate, position or expert shows in the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

# Every dimension a multiple of 16: the packed CPU kernels take these shapes.
TINY_EVEN: Mapping[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 4,
}

# Nothing divides anything nicely, the two stacks differ, and the decoder ends in a dense layer.
TINY_ODD: Mapping[str, Any] = {
    "vocab_size": 53,
    "d_model": 36,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 27,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 7,
}

# Standard deviation of a weight times sqrt(fan in), by part of its name.
_GAINS: Mapping[str, float] = {"shared": 0.6, "router": 2.0, "q_proj": 2.0, "k_proj": 2.0, "cross_attention": 2.0, "fc": 2.0}


def tiny_config(**overrides: Any) -> NllbMoeConfig:
    """NllbMoeConfig of TINY_EVEN with `overrides` on top."""
    return NllbMoeConfig(**{**TINY_EVEN, "max_position_embeddings": 64, "dropout": 0.0, **overrides})


def make_tiny_model(*, seed: int, eos_bias: float = 0.0, **overrides: Any) -> NllbMoeForConditionalGeneration:
    """Random HF model in eval mode, fp32. `eos_bias` is added to the eos logit, more or less: larger ends outputs sooner."""
    model = NllbMoeForConditionalGeneration(tiny_config(**overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_draw(name, parameter, generator))
        eos_row = model.lm_head.weight[model.config.eos_token_id]
        model.model.decoder.layer_norm.bias += eos_bias * eos_row / eos_row.square().sum()
    return model


def make_tiny_checkpoint(directory: Path, *, seed: int, eos_bias: float = 0.0, **overrides: Any) -> Path:
    """Save a random model (config.json, model.safetensors) into `directory` and return it.

    `overrides` are NllbMoeConfig fields; TINY_EVEN is the base, `**TINY_ODD` the second named variant.
    """
    make_tiny_model(seed=seed, eos_bias=eos_bias, **overrides).save_pretrained(directory)
    return directory


def load_hf_model(directory: Path) -> NllbMoeForConditionalGeneration:
    """The oracle: transformers' own model in eval mode, fp32, CPU. It knows top-2 gating only; where config.json says one
    expert a token, its gates are replaced: the first choice keeps its probability, the second gets nothing."""
    if not transformers.__version__.startswith("4."):
        raise RuntimeError(
            f"transformers {transformers.__version__} computes NLLB-MoE wrongly and cannot be the oracle: "
            "pip install transformers==4.57.6"
        )
    model = NllbMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    if not model.config.tie_word_embeddings:  # then it draws at random what it has not stored: copies of the embedding
        model.model.encoder.embed_tokens.weight = model.model.decoder.embed_tokens.weight = model.model.shared.weight
    if getattr(model.config, "num_experts_per_tok", 2) == 1:
        for module in model.modules():
            if isinstance(module, NllbMoeTop2Router):
                module.normalize_router_probabilities = _first_choice_only
    return model


def _first_choice_only(router_probs: Tensor, top_1_mask: Tensor, top_2_mask: Tensor) -> tuple[Tensor, Tensor]:
    first = (router_probs * top_1_mask).sum(dim=1)
    return first, torch.zeros_like(first)


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Sharp attention and strong experts, so that outputs depend on the source and do not collapse to one token."""
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if "layer_norm" in name:
        return (3.0 if name.endswith("decoder.layer_norm.weight") else 1.0) + 0.2 * noise
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
    return noise * (gain / parameter.shape[-1] ** 0.5)
