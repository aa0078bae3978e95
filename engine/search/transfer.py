"""Small arrays between host and device, without waiting where none is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_STAGED_BYTES = 64 << 10  # up to here the driver takes pageable memory into its own buffer and returns at once


def to_device(array: NDArray[np.int32] | NDArray[np.float32], device: torch.device) -> Tensor:
    """Copy into new memory without waiting for the device, as `copy_to_device`."""
    tensor = torch.from_numpy(array)
    return _staged(tensor).to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_to_device(buffer: Tensor, array: NDArray[np.int32]) -> None:
    """Fill `buffer`, of the array's shape and type, without waiting for the device. Large arrays go through pinned memory,
    which torch keeps until the copy is done; small ones do not: asking torch for it costs more (17 against 10 us for 40 kB).
    """
    tensor = torch.from_numpy(array)
    buffer.copy_(_staged(tensor) if buffer.is_cuda else tensor, non_blocking=True)


def _staged(tensor: Tensor) -> Tensor:
    return tensor if tensor.nbytes <= _STAGED_BYTES else tensor.pin_memory()


class TableReader:
    """Whole tables of the device, copied to pinned memory. Whole, since copies run beside a step, while kernels that pick
    rows would have to wait until those of the step leave them room.
    """

    def __init__(self, *tables: Tensor) -> None:
        self._tables = tables
        self._on_gpu = tables[0].is_cuda
        self._copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) if self._on_gpu else t for t in tables]
        self._arrays: tuple[NDArray[Any], ...] = tuple(copy.numpy() for copy in self._copies)

    def start(self) -> None:
        """Begin to copy what they hold once the current stream gets there."""
        if self._on_gpu:
            for copy, table in zip(self._copies, self._tables, strict=True):
                copy.copy_(table, non_blocking=True)

    def read(self) -> tuple[NDArray[Any], ...]:
        """What was copied since `start`, valid until the next one; waits for the current stream. Without a GPU the tables
        themselves, so valid only until they change."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return self._arrays
