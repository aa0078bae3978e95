"""The unit file: systemd's own check, and that it starts our command and stops it so that nothing is lost.

What a stop does is run in tests/cluster/test_sigterm.py.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from app.cli import build_parser
from app.serve_config import load_serve_config
from tests.cluster_configs.folder import CONFIGS, tool

UNIT = CONFIGS / "systemd/babelephant.service"


def settings() -> dict[str, list[str]]:
    """Values of each key, in order; no key of ours is in two sections."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_systemd_accepts_it(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    here = UNIT.read_text(encoding="utf-8").replace("/opt/babelephant/.venv/bin", str(Path(sys.executable).parent))
    unit.write_text(here, encoding="utf-8")
    command = [tool("systemd-analyze"), "verify", "--recursive-errors=no", unit]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    unit.write_text(here.replace("KillMode=mixed", "KillMode=gentle"), encoding="utf-8")
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "kill mode" in bad.stderr  # it does look


def test_it_starts_our_command_and_waits_for_the_drain() -> None:
    (command,) = settings()["ExecStart"]
    program, *arguments = shlex.split(command)
    (home,) = settings()["WorkingDirectory"]
    assert program == f"{home}/.venv/bin/babelephant"
    options = build_parser().parse_args(arguments)
    config = load_serve_config(CONFIGS.parent / options.config)
    drains = [
        deployment.model_dump(exclude_unset=True).get("graceful_shutdown_timeout_s", 0)
        for application in config.applications
        for deployment in application.deployments
    ]
    assert int(settings()["TimeoutStopSec"][0]) >= max(drains) + 20
    assert settings()["KillMode"] == ["mixed"]
