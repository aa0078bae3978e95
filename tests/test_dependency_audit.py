"""What could not be looked up is never reported as clean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.dependency_audit import CONSTRAINTS, audit, findings, pins, verdict

# What pip-audit 2.10.1 printed, with exit status 0 and "No known vulnerabilities found", where it reached no database.
NOTHING_REACHED = """{"dependencies": [
 {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"},
 {"name": "fastapi", "skip_reason": "Dependency not found on PyPI and could not be audited: fastapi (0.165.0)"}],
 "fixes": []}"""
PINNED = {"torch": "2.13.0", "fastapi": "0.165.0"}


def test_every_pin_of_the_project_is_read() -> None:
    text = CONSTRAINTS.read_text(encoding="utf-8")
    found = pins(text)
    assert len(found) == sum("==" in line for line in text.splitlines() if not line.startswith("#"))
    assert {"torch", "ray", "fastapi"} <= found.keys()
    assert pins("a==1.0+cpu ; platform_system == 'Linux'  # why\n# b==2\nc>=3\n") == {"a": "1.0"}


def test_skipped_packages_are_not_clean() -> None:
    found = findings(PINNED, NOTHING_REACHED, "")
    assert all("could not be audited" in finding.not_audited for finding in found)
    assert verdict(found) == 2
    assert verdict([]) == 2


def test_a_vulnerability_outweighs_and_clean_needs_a_look_at_everything() -> None:
    clean = {"name": "torch", "version": "2.13.0", "vulns": []}
    hit = {"name": "FastAPI", "version": "0.165.0", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}
    assert verdict(findings(PINNED, json.dumps({"dependencies": [clean, {**hit, "vulns": []}]}), "")) == 0
    assert verdict(findings(PINNED, json.dumps({"dependencies": [clean, hit]}), "")) == 1
    forgotten = findings(PINNED, json.dumps({"dependencies": [clean]}), "")
    assert [finding.name for finding in forgotten if finding.not_audited] == ["fastapi"]
    assert verdict(forgotten) == 2


def test_a_broken_or_absent_tool_audits_nothing(tmp_path: Path) -> None:
    for command in (["/does/not/exist"], [sys.executable, "-c", "import sys; sys.exit('no network')"]):
        found = audit(PINNED, command)
        assert {finding.name for finding in found if finding.not_audited} == set(PINNED)
        assert verdict(found) == 2
    assert "no network" in found[0].not_audited
