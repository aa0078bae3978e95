"""Random models as checkpoint directories: HF shards in fp16, or a converted checkpoint whose codes come from the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.bench.random_model import RandomWeights
from engine.config import QuantScheme
from engine.weights.manifest import Manifest
from engine.weights.mapping import CODES_SUFFIX, HEAD_NAME, SCALES_SUFFIX, expected_specs, is_expert_matrix
from engine.weights.shards import ShardWriter


def write_checkpoint(
    weights: RandomWeights,
    out_dir: Path,
    scheme: QuantScheme | None,
    *,
    progress: bool = False,
    max_shard_bytes: int = 1 << 30,
) -> int:
    """Write the model into the new directory `out_dir`; returns the bytes of its tensors.

    scheme None: an HF checkpoint in fp16 (`model-00001.safetensors`, ... and their index), input for the converter. Else the
    converted form, drawn as codes, never held in another precision: memory holds one shard. A converted checkpoint is what
    converting the fp16 one would give, up to the choice of scales. Raises FileExistsError when `out_dir` exists.
    """
    out_dir.mkdir(parents=True)
    raw = {**asdict(weights.untied), "model_type": "nllb-moe"}
    (out_dir / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    writer = ShardWriter(out_dir, max_shard_bytes, "model" if scheme is None else "quantized")
    num_bytes = 0
    for tensors in tqdm(_tensors(weights, scheme), disable=not progress, unit="tensor"):
        num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        writer.add(tensors)
    shards = writer.close()
    if scheme is None:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": writer.weight_map}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    else:
        Manifest(scheme.name, shards, source_sha256={}, relative_errors={}).write(out_dir)
    return num_bytes


def _tensors(weights: RandomWeights, scheme: QuantScheme | None) -> Iterator[dict[str, Tensor]]:
    """What goes into the files together, on the CPU."""
    for name, spec in expected_specs(weights.untied).items():
        # transformers takes a head only beside names with the prefix
        stored = name if scheme is not None or name == HEAD_NAME else f"model.{name}"
        if not is_expert_matrix(name):
            tensor = weights.tensor(name, spec.shape)
            yield {stored: tensor.to(torch.float16 if scheme is None else torch.bfloat16).cpu()}
            continue
        matrix = weights.expert_matrix(name, (spec.shape[0], spec.shape[1]))
        if scheme is None:
            yield {stored: matrix.dense(torch.float16).cpu()}
        else:
            quantized = matrix.quantized(scheme)
            yield {name + CODES_SUFFIX: quantized.codes.cpu(), name + SCALES_SUFFIX: quantized.scales.cpu()}
