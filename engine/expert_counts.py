"""Which experts the decoder's rows go to, counted while a checkpoint translates: plain torch on any device, for measuring.

Legend: L sparse decoder layers, E experts, k = 1 or 2 active experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import EngineConfig
from engine.model.mixture_of_experts import MixtureOfExperts, Router
from engine.model.transformer import Transformer
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.translator import Translator
from engine.types import SearchOptions
from engine.weights.loading import load_transformer

Pair = tuple[str, str]  # source and target language, FLORES-200


@dataclass(frozen=True, slots=True)
class CountingRouter(Router):
    """A router that adds up in `counts` int64[E] how many tokens each expert gets."""

    counts: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As Router."""
        expert_ids, gates = Router.__call__(self, x)
        self.counts.add_(torch.bincount(expert_ids.view(-1), minlength=len(self.counts)))
        return expert_ids, gates


def with_counting_decoder(transformer: Transformer) -> tuple[Transformer, dict[int, Tensor]]:
    """The same weights with counting routers in the decoder, and their counts int64[E] by layer."""
    counts: dict[int, Tensor] = {}
    layers = []
    for place, layer in enumerate(transformer.decoder_layers):
        moe = layer.feed_forward
        if isinstance(moe, MixtureOfExperts):
            counts[place] = torch.zeros(moe.fc1.num_experts, dtype=torch.int64, device=transformer.device)
            moe = replace(moe, router=CountingRouter(moe.router.classifier, moe.router.top_k, counts[place]))
        layers.append(replace(layer, feed_forward=moe))
    return replace(transformer, decoder_layers=tuple(layers)), counts


def count_experts(
    checkpoint: Path, texts: Mapping[Pair, Sequence[str]], config: EngineConfig, search: SearchOptions
) -> Iterator[tuple[Pair, tuple[int, ...], NDArray[np.int64]]]:
    """Translate the texts of each pair; yields (pair, places of the sparse decoder layers, counts int64[L, E] of its rows).

    Each layer's counts add up to k times the rows decoded. Raises RequestError for a language that the model does not know.
    """
    torch.set_num_threads(config.num_threads)
    transformer, counts = with_counting_decoder(load_transformer(checkpoint, config))
    runner = Runner(transformer, config)
    translator = Translator(Tokenizer.from_checkpoint(checkpoint), Scheduler(config), runner, config)
    for pair, sentences in texts.items():
        for each in counts.values():
            each.zero_()
        translator.translate(sentences, src_lang=pair[0], tgt_lang=pair[1], search=search)
        shape = (len(counts), -1) if counts else (0, 0)
        found = np.array([each.cpu().numpy() for each in counts.values()], np.int64).reshape(shape)
        yield pair, tuple(counts), found
