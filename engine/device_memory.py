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


def release_cached_memory() -> None:
    """Hand cached, unused GPU blocks back to the driver, so that a smaller piece of work finds room."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError:  # the device itself is broken: the retry will say so
        _logger.exception("cached GPU memory could not be released")
