"""Memory of a device, and the check that a model fits before its weights are read."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from engine.accounting import fitting_precisions, plan_memory
from engine.config import EngineConfig, ModelConfig


class InsufficientMemoryError(RuntimeError):
    """The model does not fit the device; the message says what would."""


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated: free GPU memory, or the least of MemAvailable and the cgroup's headroom.

    None where the platform does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [limit for limit in (_meminfo_available(), _cgroup_headroom()) if limit is not None]
    return min(limits, default=None)


def check_memory(config: ModelConfig, engine_config: EngineConfig, available: int | None) -> None:
    """Raise InsufficientMemoryError when what is planned exceeds `available` bytes (None: unknown, passes)."""
    plan = plan_memory(config, engine_config)
    held_back = plan.driver_bytes + plan.ngram_bytes  # so that a request with an n-gram rule finds its memory, too
    needed = plan.total_bytes + held_back
    if available is None or needed <= available:
        return
    fits = fitting_precisions(config, available - plan.kv_cache_bytes - plan.workspace_bytes - held_back)
    advice = f"precisions that would fit: {', '.join(fits)}" if fits else "no precision would fit"
    raise InsufficientMemoryError(
        f"{engine_config.precision} needs {_gb(needed)} on {engine_config.device} "
        f"(experts {_gb(plan.experts_bytes)}, rest {_gb(plan.rest_bytes)}, CPU layouts {_gb(plan.layout_copies_bytes)}, "
        f"KV cache {_gb(plan.kv_cache_bytes)}, workspace {_gb(plan.workspace_bytes)}, driver {_gb(plan.driver_bytes)}, "
        f"n-gram rules {_gb(plan.ngram_bytes)}), "
        f"but {_gb(available)} are available; {advice} (lower max_rows or max_source_slots for a smaller cache)"
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _meminfo_available() -> int | None:
    path = Path("/proc/meminfo")
    text = path.read_text(encoding="ascii") if path.exists() else ""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cgroup_headroom() -> int | None:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or not used.exists():
        return None
    value = limit.read_text(encoding="ascii").strip()
    return None if value == "max" else int(value) - int(used.read_text(encoding="ascii"))
