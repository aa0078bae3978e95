"""The precision to work at where the caller names none."""

from __future__ import annotations

from pathlib import Path


def default_precision(checkpoint: Path, otherwise: str = "w8a16") -> str:
    """What a converted checkpoint holds, else `otherwise`. Loads torch. Raises CheckpointError for a damaged manifest."""
    from engine.weights.manifest import read_manifest

    manifest = read_manifest(checkpoint)
    return manifest.precision if manifest else otherwise
