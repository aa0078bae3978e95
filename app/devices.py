"""Whether the device that was asked for is there, said before anything is loaded onto it."""

from __future__ import annotations


class DeviceError(ValueError):
    """A device that this machine does not have; the message says what to do."""


def require_device(name: str) -> str:
    """`name` itself: `cpu`, `cuda` or `cuda:N`. Loads torch. Raises DeviceError."""
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise DeviceError(f"device {name!r} is unknown; choose cpu or cuda")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"device {name}: torch {torch.__version__} sees no such GPU; choose cpu, install a CUDA build of torch, or "
            "give the replica a GPU (num_gpus under ray_actor_options)"
        )
    return name
