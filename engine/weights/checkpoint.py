"""Read a checkpoint directory: what its files hold (from headers alone), and the tensors, one at a time.

Accepted: model.safetensors, model.safetensors.index.json with its shards, pytorch_model.bin, or
pytorch_model.bin.index.json with its shards (read with weights_only: no code runs).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the files or tensors and the fix."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor; `dtype` by its safetensors name (F32, BF16, F16, U8, ...)."""

    shape: tuple[int, ...]
    dtype: str


def shard_paths(checkpoint: Path) -> list[Path]:
    """Weight files of an HF checkpoint in name order; safetensors where both forms exist.

    Raises CheckpointError when there are none or the index names a file that is absent.
    """
    for single in _SINGLE_FILES:
        if (checkpoint / single).is_file():
            return [checkpoint / single]
        index = checkpoint / f"{single}.index.json"
        if index.is_file():
            return _indexed_shards(index)
    raise CheckpointError(f"{checkpoint} has no weights; expected one of {', '.join(_SINGLE_FILES)} or their .index.json")


def read_specs(paths: list[Path]) -> dict[str, TensorSpec]:
    """Specs of all tensors by stored name, without reading their data. Raises CheckpointError for a damaged file."""
    specs: dict[str, TensorSpec] = {}
    for path in paths:
        shard = _safetensors_specs(path) if path.suffix == ".safetensors" else _pickle_specs(path)
        twice = sorted(specs.keys() & shard.keys())
        if twice:
            raise CheckpointError(f"{path} repeats tensors of an earlier shard: {', '.join(twice[:5])}")
        specs.update(shard)
    return specs


def stream_tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield (stored name, tensor) for every tensor of every shard, one in memory at a time."""
    for path in paths:
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as shard:
                for name in shard.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    yield name, shard.get_tensor(name)
        else:
            yield from _load_pickle(path).items()


def _indexed_shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a weight index ({error!r}); download it again") from error
    paths = [index.parent / name for name in sorted(names)]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent)}; download them")
    return paths


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} is damaged, cut short or absent ({error}); download or convert it again") from error


def _safetensors_specs(path: Path) -> dict[str, TensorSpec]:
    specs = {}
    with _open_safetensors(path) as shard:
        for name in shard.keys():  # noqa: SIM118  (safe_open is not a mapping)
            view = shard.get_slice(name)
            specs[name] = TensorSpec(tuple(view.get_shape()), view.get_dtype())
    return specs


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, cut short or not a plain state dict ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} does not hold a plain state dict (name -> tensor)")
    return tensors


def _pickle_specs(path: Path) -> dict[str, TensorSpec]:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    return {
        name: TensorSpec(tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in _load_pickle(path).items()
    }
