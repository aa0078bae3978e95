"""What a process loads: planning, ingress and command line start without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def loaded_by(code: str) -> set[str]:
    """Top-level modules in sys.modules after running `code` in a new process."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["app.serve", "app.ingress", "app.replica", "app.cli", "app.serve_config"])
def test_no_torch(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "transformers", "triton"}


def test_building_the_application_and_the_command_line_loads_no_torch() -> None:
    code = """
from app.serve import build_app
from app.settings import ServiceSettings
build_app(ServiceSettings.model_validate({"pools": {"demo": {}}}))
from app.cli import build_parser
build_parser()
"""
    assert not loaded_by(code) & {"torch", "transformers", "triton"}


def test_help_needs_neither_torch_nor_ray() -> None:
    assert not loaded_by("from app.cli import build_parser; build_parser().format_help()") & {"torch", "ray", "transformers"}


def test_pure_parts_need_no_ray_and_no_web_framework() -> None:
    loaded = loaded_by("import app.settings, app.routing, app.schemas, app.text.languages, app.text.lines")
    assert not loaded & {"torch", "ray", "fastapi", "starlette"}
