"""Small arrays to the device, without waiting where none is needed."""

from __future__ import annotations

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
