"""When memory runs out: telling it from other faults, and giving back what torch keeps in reserve."""

from __future__ import annotations

import logging

import torch

_logger = logging.getLogger(__name__)
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, and torch's allocator on the CPU


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's own error, Python's, and the plain RuntimeErrors of drivers and the CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def require_free_memory(num_bytes: int, device: torch.device, purpose: str) -> None:
    """Raise torch.OutOfMemoryError unless the driver of this GPU has so much left, once torch has given back what it does
    not use. For work in which running out cannot be undone halfway."""
    if torch.cuda.mem_get_info(device)[0] >= num_bytes:
        return
    release_cached_memory()
    free_bytes = torch.cuda.mem_get_info(device)[0]
    if free_bytes < num_bytes:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory: {free_bytes >> 20} MiB are left, {purpose} wants {num_bytes >> 20}; "
            "lower max_rows or encode_token_budget, or end what else uses this GPU"
        )


def release_cached_memory() -> None:
    """Hand cached, unused GPU blocks back to the driver, so that a smaller piece of work finds room."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError:  # the device itself is broken: the retry will say so
        _logger.exception("cached GPU memory could not be released")
