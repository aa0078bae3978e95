"""Small arrays between host and device, without waiting where none is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_STAGED_BYTES = 64 << 10  # up to here the driver takes pageable memory into its own buffer and returns at once


def to_device(array: NDArray[np.int32] | NDArray[np.float32], device: torch.device) -> Tensor:
    """Copy without waiting for the device. Large arrays go through pinned memory, which torch keeps until the copy is done;
    small ones do not: asking torch for pinned memory costs more (17 against 10 us for 40 kB)."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return (tensor if array.nbytes <= _STAGED_BYTES else tensor.pin_memory()).to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[NDArray[Any]]:
    """Copies, all of them under way at once; waits for the current stream."""
    if tensors[0].device.type != "cuda":
        return [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.cuda.current_stream().synchronize()
    return [copy.numpy() for copy in copies]
