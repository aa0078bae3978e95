"""Two pictures that belong with the demonstration model: its training curves, and which experts its languages use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.demo.evaluation import PIVOT, read_heldout
from engine.demo.training.batches import IGNORED_LABEL, ROW_LENGTH, Batch
from engine.demo.training.checkpoint import read_checkpoint
from engine.demo.training.network import TrainingNetwork
from engine.tokenizer import Tokenizer

_TEXTS = 40


def expert_shares(checkpoint: Path) -> tuple[tuple[str, ...], list[str], NDArray[np.float64]]:
    """(languages, names of sparse layers, share float[layers, L, E] of tokens whose first expert is e).

    Encoder layers see held-out interface texts of the language, decoder layers its translations of the English ones.
    """
    config = ModelConfig.from_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    network = TrainingNetwork(config, dropout=0.0, label_smoothing=0.0, balance_weight=0.0).eval()
    read_checkpoint(network, checkpoint)
    names = [f"encoder {i}" for i in range(config.encoder_layers) if config.is_sparse("encoder", i)]
    num_encoder = len(names)
    names += [f"decoder {i}" for i in range(config.decoder_layers) if config.is_sparse("decoder", i)]
    groups = [g["texts"] for g in read_heldout() if g["kind"] == "interface"]
    shares = np.zeros((len(names), len(tokenizer.languages), config.num_experts))
    with torch.no_grad():
        for column, code in enumerate(tokenizer.languages):
            pivot = PIVOT if code != PIVOT else "deu_Latn"
            texts = [g for g in groups if code in g and pivot in g][:_TEXTS]
            load = network(_batch(tokenizer, [(g[code], g[pivot]) for g in texts], (code, pivot), config))["load"]
            shares[:num_encoder, column] = load[:num_encoder]
            load = network(_batch(tokenizer, [(g[pivot], g[code]) for g in texts], (pivot, code), config))["load"]
            shares[num_encoder:, column] = load[num_encoder:]
    return tokenizer.languages, names, shares


def _batch(tokenizer: Tokenizer, pairs: list[tuple[str, str]], direction: tuple[str, str], config: ModelConfig) -> Batch:
    """One sentence pair per row, cut to ROW_LENGTH (routing statistics only)."""
    shape = (len(pairs), ROW_LENGTH)
    source, target = (torch.full(shape, config.pad_token_id) for _ in range(2))
    labels = torch.full(shape, IGNORED_LABEL)
    for row, (source_text, target_text) in enumerate(pairs):
        ids = torch.from_numpy(tokenizer.encode(source_text, direction[0])[:ROW_LENGTH]).long()
        source[row, : len(ids)] = ids
        ids = torch.from_numpy(tokenizer.encode(target_text, direction[1])[:ROW_LENGTH]).long()
        labels[row, : len(ids)] = ids
        target[row, 0] = config.decoder_start_token_id
        target[row, 1 : len(ids)] = ids[:-1]
    source_valid = source != config.pad_token_id
    causal = torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool).tril()
    whole = torch.ones(len(pairs), 1, ROW_LENGTH, 1, dtype=torch.bool)
    return Batch(
        source_ids=source,
        target_ids=target,
        labels=labels,
        positions=torch.arange(ROW_LENGTH).expand(shape),
        source_valid=source_valid,
        source_mask=whole & source_valid[:, None, None, :],
        target_mask=whole & causal,
        cross_mask=whole & source_valid[:, None, None, :],
    )


def plot_experts(checkpoint: Path, out: Path) -> None:
    """Write a heat map (PNG) of `expert_shares`."""
    from matplotlib import pyplot

    languages, names, shares = expert_shares(checkpoint)
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 4.2), sharey=True, layout="constrained")
    for axis, name, share in zip(np.atleast_1d(axes), names, shares, strict=True):
        image = axis.imshow(share, vmin=0, vmax=max(0.5, float(shares.max())), cmap="viridis", aspect="auto")
        axis.set_title(f"{name} layer")
        axis.set_xlabel("expert")
        axis.set_yticks(range(len(languages)), languages)
    figure.colorbar(image, ax=axes, label="share of tokens (first expert)")
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def plot_training(log: Path, out: Path) -> None:
    """Write the curves (PNG) of a training log: loss on the left, held-out token accuracy on the right."""
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    valid = [record for record in records if "valid_interface_nll" in record]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot([r["elapsed_s"] for r in records], [r["nll"] for r in records], label="train (dropout on)")
    for name in ("interface", "cldr"):
        left.plot(
            [r["elapsed_s"] for r in valid], [r[f"valid_{name}_nll"] for r in valid], marker=".", label=f"held out, {name}"
        )
        right.plot([r["elapsed_s"] for r in valid], [r[f"valid_{name}_accuracy"] for r in valid], marker=".", label=name)
    left.set(xlabel="seconds of training", ylabel="negative log-likelihood per token", ylim=(0, 3))
    right.set(xlabel="seconds of training", ylabel="token accuracy, held out")
    left.legend()
    right.legend()
    figure.savefig(out, dpi=90)
    pyplot.close(figure)
