"""Writes tensors into numbered safetensors shards as they come."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


@dataclass(slots=True)
class ShardWriter:
    """Collects tensors and writes `<prefix>-00001.safetensors`, ... whenever `max_shard_bytes` are together; one `add` stays
    in one shard. weight_map: file of every tensor written so far, by name.
    """

    directory: Path
    max_shard_bytes: int
    prefix: str = "quantized"
    weight_map: dict[str, str] = field(default_factory=dict)
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _names: list[str] = field(default_factory=list)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Tensors on any device, by name; what is pending stays there until its shard is written."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending.update({name: tensor.contiguous() for name, tensor in tensors.items()})
        self._pending_bytes += size

    def close(self) -> tuple[str, ...]:
        """Write the last shard; names of all shards, in order."""
        self._flush()
        return tuple(self._names)

    def _flush(self) -> None:
        name = f"{self.prefix}-{len(self._names) + 1:05d}.safetensors"
        path = self.directory / name
        save_file(self._pending, path, metadata={"format": "pt"})
        with path.open("rb") as shard:
            os.fsync(shard.fileno())
        self._names.append(name)
        self.weight_map.update(dict.fromkeys(self._pending, name))
        self._pending.clear()
        self._pending_bytes = 0
