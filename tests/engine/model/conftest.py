"""Tiny models shared by the model tests: our Transformer, the oracle, and the weights by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NllbMoeForConditionalGeneration

from engine.config import EngineConfig, ModelConfig
from engine.model.transformer import Transformer
from engine.weights.loading import load_transformer
from tests.engine.tiny import TINY_EVEN, TINY_ODD, load_hf_model, make_tiny_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "even": dict(TINY_EVEN),
    "odd": dict(TINY_ODD),
    "odd-width": {"d_model": 27, "encoder_attention_heads": 3, "decoder_attention_heads": 9, "router_bias": True},
    "every-layer-sparse-two-experts": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_experts": 2},
    "one-expert-a-token": {**TINY_ODD, "num_experts_per_tok": 1, "router_bias": True},
    "head-of-its-own": {**TINY_ODD, "tie_word_embeddings": False},
    "dense": {"encoder_sparse_step": 0, "decoder_sparse_step": 0, "scale_embedding": False},
}


@dataclass(frozen=True)
class TinyModel:
    config: ModelConfig
    transformer: Transformer
    oracle: NllbMoeForConditionalGeneration
    weights: dict[str, Tensor]

    def random_ids(self, length: int, seed: int) -> list[int]:
        """Ids from 3 on: no special tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.config.vocab_size, (length,), generator=generator).tolist()


@pytest.fixture(scope="session", params=list(VARIANTS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    seed = list(VARIANTS).index(request.param)
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp(request.param), seed=seed, **VARIANTS[request.param])
    oracle = load_hf_model(checkpoint)
    return TinyModel(
        config=ModelConfig.from_checkpoint(checkpoint),
        transformer=load_transformer(checkpoint, EngineConfig(precision="fp32", max_source_tokens=40, max_target_tokens=40)),
        oracle=oracle,
        weights={name.removeprefix("model."): value for name, value in oracle.state_dict().items()},
    )
