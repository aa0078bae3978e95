"""Reader of measured tile choices: kernels/configs/<device>/<op>.json.

A file holds a birth certificate (GPU, Triton version, date, commit) and entries {"shape": {...}, "max_size": int,
"choice": {...}, "us": measured time}. An entry serves its exact shape for every size up to max_size that no smaller entry
serves; the largest one serves everything above it too.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

CONFIG_ROOT = Path(__file__).parent / "configs"
Choice = dict[str, int | bool]


def device_folder(name: str) -> str:
    """Folder name of a GPU: `NVIDIA H200` -> `nvidia_h200`."""
    return "_".join(name.lower().split())


@functools.cache
def _entries(op: str, device_name: str) -> list[tuple[dict[str, int], int, Choice]]:
    path = CONFIG_ROOT / device_folder(device_name) / f"{op}.json"
    if not path.exists():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return sorted(((e["shape"], e["max_size"], e["choice"]) for e in entries), key=lambda e: e[1])


@functools.cache
def stored_choice(op: str, device_name: str, shape: tuple[tuple[str, int], ...], size: int) -> Choice | None:
    """The choice stored for a GPU of this name; shape as (name, value) pairs. None when nobody measured it."""
    serving = [(limit, choice) for entry, limit, choice in _entries(op, device_name) if entry == dict(shape)]
    for limit, choice in serving:
        if size <= limit:
            return choice
    return serving[-1][1] if serving else None


def measured_choice(op: str, device: torch.device, *, shape: dict[str, int], size: int) -> Choice | None:
    """The measured choice for this shape and size on this device; None when nobody measured it (or there is no GPU)."""
    if device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    return stored_choice(op, torch.cuda.get_device_name(index), tuple(sorted(shape.items())), size)
