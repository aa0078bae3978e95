"""What every launcher needs: argument checks and launch arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import torch


def check(condition: bool, message: str) -> None:
    """Raise ValueError with a message that names the fix."""
    if not condition:
        raise ValueError(message)


def next_power_of_two(n: int) -> int:
    """Smallest power of two >= n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def overlap(like: torch.Tensor) -> dict[str, Any]:
    """`overlap_options` for a kernel that works on this tensor's device."""
    supported = like.is_cuda and _capability(like.device.index or 0) >= (9, 0)
    return overlap_options(supported)


def overlap_options(supported: bool) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before it in the stream still runs (programmatic dependent
    launch, compute capability 9.0 on). Such a kernel waits (`gdc_wait`) before it touches what others write, and at once
    lets the next one start in the same way. A cooperative launch does both, too: its programs come as those before them go,
    and the next kernel's come once all of them are there, so that those who wait for each other are resident. The kernels of
    `small_linear` let the next one start before they wait themselves; `decode_attention` says what that asks of its callers.
    """
    return {"OVERLAP": True, "launch_pdl": True} if supported else {"OVERLAP": False}


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
