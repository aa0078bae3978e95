"""What could not be looked up is never reported as clean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.dependency_audit import CONSTRAINTS, audit, audit_in_turn, findings, pins, summary, verdict

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


# Stands for pip-audit: the service named first on its command line knows the packages that follow it, up to "--".
_SERVICE = """
import json, sys
known = sys.argv[1 : sys.argv.index("--")]
path = sys.argv[sys.argv.index("--requirement") + 1]
names = [line.partition("==")[0] for line in open(path)]
entries = [{"name": n, "vulns": [{"id": "PYSEC-2"}] if n == "fastapi" else []} for n in names if n in known]
print(json.dumps({"dependencies": entries + [{"name": n, "skip_reason": "unheard of"} for n in names if n not in known]}))
"""


def test_what_one_service_does_not_know_is_asked_of_the_next() -> None:
    command = [sys.executable, "-c", _SERVICE]
    both = audit_in_turn(PINNED, command, [("torch", "--"), ("fastapi", "--")])
    assert [(finding.name, finding.vulnerabilities, finding.not_audited) for finding in both] == [
        ("fastapi", ("PYSEC-2",), ""),
        ("torch", (), ""),
    ]
    assert "VULNERABLE   fastapi 0.165.0: PYSEC-2\n2 pinned packages: 2 audited, 1 vulnerable, 0 not audited" in summary(
        both
    )
    half = audit_in_turn(PINNED, command, [("torch", "--"), ("--",)])
    assert "not audited  fastapi 0.165.0: unheard of; unheard of\n" in summary(half)
    assert verdict(half) == 2


def test_nothing_looked_up_says_what_to_do_instead_of_a_list() -> None:
    found = audit_in_turn(PINNED, [sys.executable, "-c", _SERVICE], [("--",)])
    said = summary(found)
    assert "for any of 2 packages (fastapi: unheard of)" in said
    assert 'make audit AUDIT_ARGS="' in said
    assert "not audited  " not in said
    assert said.endswith("2 pinned packages: 0 audited, 0 vulnerable, 2 not audited")
    assert verdict(found) == 2
