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
    """A table of the device, copied to pinned memory from its first line on. Not only the parts that are asked for: a copy
    runs beside a step, while a kernel that picks them would have to wait until those of the step leave it room.
    """

    def __init__(self, table: Tensor) -> None:
        self._table, self._on_gpu = table, table.is_cuda
        self._copy = torch.empty(table.shape, dtype=table.dtype, pin_memory=True) if self._on_gpu else table
        self._array: NDArray[Any] = self._copy.numpy()

    def read(self, num_lines: int) -> NDArray[Any]:
        """What the first lines hold now, valid until the next call; waits for the current stream. Without a GPU the table
        itself, so valid only until it changes."""
        if self._on_gpu:
            self._copy[:num_lines].copy_(self._table[:num_lines], non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return self._array[:num_lines]
