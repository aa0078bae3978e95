"""HF checkpoint -> converted checkpoint: quantized shards, a manifest, and the small files copied along.

The converted directory holds the non-expert tensors in the source's dtype and names (without the `model.` prefix), and
each expert matrix as `<name>.codes` and `<name>.scales`. Loading it gives bit for bit what quantizing on load gives.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.config import ModelConfig, QuantScheme
from engine.quantization.symmetric import QuantizationError, quantize, relative_error
from engine.weights.checkpoint import CheckpointError, read_specs, shard_paths, stream_tensors
from engine.weights.manifest import MANIFEST_NAME, Manifest
from engine.weights.mapping import (
    CODES_SUFFIX,
    EMBEDDING_NAME,
    SCALES_SUFFIX,
    canonical_name,
    expected_specs,
    is_expert_matrix,
)
from engine.weights.shards import ShardWriter
from engine.weights.validation import check_specs, differing_copies

_COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_HASH_CHUNK_BYTES = 1 << 20


def convert(
    checkpoint: Path,
    out_dir: Path,
    scheme: QuantScheme,
    *,
    progress: bool = True,
    max_shard_bytes: int = 1 << 30,
) -> Manifest:
    """Quantize `checkpoint` into the new directory `out_dir` and return its manifest.

    Everything is written to a temporary sibling that is renamed at the end: `out_dir` is complete or absent.
    Raises FileExistsError when `out_dir` exists, CheckpointError for a source that is not a matching HF checkpoint.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; choose another directory or remove it")
    if (checkpoint / MANIFEST_NAME).exists():
        raise CheckpointError(f"{checkpoint} is a converted checkpoint already; convert the original")
    config = ModelConfig.from_checkpoint(checkpoint)
    if not config.has_sparse_layers:
        raise CheckpointError(f"{checkpoint} has no experts; there is nothing to quantize")
    paths = shard_paths(checkpoint)
    specs = read_specs(paths)
    check_specs(specs, expected_specs(config))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
        partial = Path(temporary) / "converted"
        partial.mkdir()
        writer = ShardWriter(partial, max_shard_bytes)
        has_head = not config.tie_word_embeddings
        errors = _convert_tensors(paths, len(specs), scheme, writer, has_head=has_head, progress=progress)
        manifest = Manifest(scheme.name, writer.close(), {path.name: _sha256(path) for path in paths}, errors)
        manifest.write(partial)
        for name in _COPIED_FILES:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, partial / name)
        partial.rename(out_dir)
    return manifest


def _convert_tensors(
    paths: list[Path], num_tensors: int, scheme: QuantScheme, writer: ShardWriter, *, has_head: bool, progress: bool
) -> dict[str, float]:
    """Feed every tensor to the writer, experts quantized; relative error by matrix name."""
    errors: dict[str, float] = {}
    embedding: tuple[str, Tensor] | None = None  # with the name it is stored under
    for stored_name, tensor in tqdm(stream_tensors(paths), total=num_tensors, unit="tensor", disable=not progress):
        name = canonical_name(stored_name, has_head=has_head)
        if is_expert_matrix(name):
            try:
                quantized = quantize(tensor, scheme)
            except QuantizationError as error:
                raise CheckpointError(f"{stored_name}: {error}") from error
            errors[name] = relative_error(tensor, quantized)
            writer.add({name + CODES_SUFFIX: quantized.codes, name + SCALES_SUFFIX: quantized.scales})
        elif name == EMBEDDING_NAME and embedding is not None:
            if not torch.equal(embedding[1], tensor):
                raise differing_copies(embedding[0], stored_name)
        else:
            embedding = (stored_name, tensor) if name == EMBEDDING_NAME else embedding
            writer.add({name: tensor})
    return errors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
