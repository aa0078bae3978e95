"""The manifest of a converted checkpoint: what was quantized, from what, and with which error."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import ConfigError, QuantScheme
from engine.weights.checkpoint import CheckpointError

MANIFEST_NAME = "manifest.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """precision: the scheme's name. shards: weight files. source_sha256: digest of each source weight file.

    relative_errors: by matrix name, ||w - w'|| / ||w||. format_version: raised when the layout changes.
    """

    precision: str
    shards: tuple[str, ...]
    source_sha256: dict[str, str]
    relative_errors: dict[str, float]
    format_version: int = _FORMAT_VERSION

    @property
    def scheme(self) -> QuantScheme:
        """Parsed `precision`."""
        scheme = QuantScheme.from_name(self.precision)
        if scheme is None:
            raise CheckpointError(f"{MANIFEST_NAME}: precision {self.precision} is not a quantized one")
        return scheme

    def check_scheme(self, checkpoint: Path, wanted: QuantScheme | None) -> None:
        """Raise CheckpointError unless `wanted` is what the checkpoint was converted to."""
        if self.scheme != wanted:
            asked = wanted.name if wanted else "an unquantized precision"
            raise CheckpointError(
                f"{checkpoint} was converted to {self.precision}, but {asked} was asked for; "
                f"set precision {self.precision} or go back to the original checkpoint"
            )

    def write(self, directory: Path) -> None:
        """Write `directory/manifest.json`."""
        (directory / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Manifest of a converted checkpoint, None for an ordinary one. Raises CheckpointError for a damaged one."""
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**{**raw, "shards": tuple(raw["shards"])})
        manifest.scheme  # noqa: B018  (refuses an unknown precision here, with the file's name)
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); convert the checkpoint again") from error
    if manifest.format_version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {manifest.format_version}; this engine reads {_FORMAT_VERSION}: convert again"
        )
    return manifest
