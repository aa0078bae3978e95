"""Checkpoint directory -> Transformer: nothing missing, nothing left over, quantized on the way in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.model.allocation import allocate_transformer
from engine.model.transformer import Transformer
from engine.quantization.symmetric import QuantizationError
from engine.weights.checkpoint import CheckpointError, read_specs, shard_paths, stream_tensors
from engine.weights.manifest import read_manifest
from engine.weights.mapping import (
    CODES_SUFFIX,
    EMBEDDING_NAME,
    HEAD_NAME,
    SCALES_SUFFIX,
    ExpertPlace,
    Place,
    TensorPlace,
    canonical_name,
    expected_specs,
    map_places,
)
from engine.weights.memory import available_bytes, check_memory
from engine.weights.validation import check_specs, differing_copies


@torch.inference_mode()
def load_transformer(checkpoint: Path, engine_config: EngineConfig) -> Transformer:
    """Load an HF or a converted checkpoint for the device, dtype and precision of `engine_config`.

    Tensors are read one at a time and experts quantized one by one, so that memory peaks little above the loaded model.
    Raises ConfigError (a model this engine cannot compute), CheckpointError (files, names, shapes or dtypes that do not
    match, a converted checkpoint of another precision) and InsufficientMemoryError, all before weights are read.
    """
    config = ModelConfig.from_checkpoint(checkpoint)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        paths = shard_paths(checkpoint)
    else:
        manifest.check_scheme(checkpoint, engine_config.quant_scheme)
        paths = [checkpoint / name for name in manifest.shards]
    check_specs(read_specs(paths), expected_specs(config, None if manifest is None else manifest.scheme))
    device = torch.device(engine_config.device)
    check_memory(config, engine_config, available_bytes(device))
    transformer = allocate_transformer(
        config,
        dtype=getattr(torch, engine_config.compute_dtype),
        device=device,
        scheme=engine_config.quant_scheme,
        max_tokens=max(engine_config.max_source_tokens, engine_config.max_target_tokens + 1),
    )
    _fill(map_places(transformer), paths)
    transformer.pack()
    return transformer


def _fill(places: dict[str, Place], paths: list[Path]) -> None:
    """Write every tensor to its place. Names, shapes and dtypes have been checked."""
    waiting: dict[str, Tensor] = {}  # codes or scales whose other half has not come yet
    embedding: str | None = None  # the stored name that filled it
    for stored_name, tensor in stream_tensors(paths):
        name = canonical_name(stored_name, has_head=HEAD_NAME in places)
        if name == EMBEDDING_NAME and embedding is not None:
            _check_copy(embedding, stored_name, tensor, places[name])
        elif name.endswith((CODES_SUFFIX, SCALES_SUFFIX)):
            _fill_half(places, name, tensor, waiting)
        else:
            _write(places[name], stored_name, tensor)
            embedding = stored_name if name == EMBEDDING_NAME else embedding


def _write(place: Place, name: str, tensor: Tensor) -> None:
    try:
        place.write(tensor)
    except QuantizationError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _fill_half(places: dict[str, Place], name: str, tensor: Tensor, waiting: dict[str, Tensor]) -> None:
    is_codes = name.endswith(CODES_SUFFIX)
    matrix = name.removesuffix(CODES_SUFFIX if is_codes else SCALES_SUFFIX)
    other = waiting.pop(matrix, None)
    if other is None:
        waiting[matrix] = tensor
        return
    codes, scales = (tensor, other) if is_codes else (other, tensor)
    place = places[matrix]
    if not isinstance(place, ExpertPlace):
        raise CheckpointError(f"{matrix} is stored quantized, but it is not an expert matrix")
    place.write_quantized(codes, scales)


def _check_copy(filled_by: str, name: str, tensor: Tensor, place: Place) -> None:
    if isinstance(place, TensorPlace) and not place.holds(tensor):
        raise differing_copies(filled_by, name)
