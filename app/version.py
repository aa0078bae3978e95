"""The installed version of this project."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def service_version() -> str:
    """Version of the installed distribution; `unreleased` when run from a source tree that is not installed."""
    try:
        return version("babelephant")
    except PackageNotFoundError:
        return "unreleased"
