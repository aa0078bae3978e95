"""Money and seconds need no tensors, no Ray and no web framework; the solver is loaded only for exact plans."""

from __future__ import annotations

import pkgutil

import app.cost
from tests.app.test_imports import loaded_by


def test_no_heavy_imports() -> None:
    modules = [f"app.cost.{module.name}" for module in pkgutil.iter_modules(app.cost.__path__)]
    assert len(modules) > 10
    loaded = loaded_by(f"import {', '.join(modules)}")
    assert not loaded & {"torch", "ray", "fastapi", "starlette", "pydantic", "highspy", "matplotlib", "scipy"}
