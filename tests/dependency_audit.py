"""Known vulnerabilities of every pinned dependency: `make audit`, or `python -m tests.dependency_audit`.

pip-audit says "No known vulnerabilities found" and ends with 0 also when it could look up nothing. Here a package that was
not looked up is *not audited*, is listed, and counts: 0 means all were audited and none is known to be vulnerable, 1 that
one is, 2 that some could not be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Finding:
    """One pinned package. `vulnerabilities` are advisory ids; `not_audited` the reason why nobody looked, or empty."""

    name: str
    version: str
    vulnerabilities: tuple[str, ...] = ()
    not_audited: str = ""


def pins(constraints: str) -> dict[str, str]:
    """name -> version of every `name==version` line; markers and comments are dropped."""
    found = {}
    for line in constraints.splitlines():
        requirement = line.partition("#")[0].partition(";")[0].strip()
        name, equals, version = requirement.partition("==")
        if equals:
            found[name.strip().lower()] = version.strip().partition("+")[0]  # advisories know no local versions
    return found


def findings(pinned: Mapping[str, str], report: str, failure: str) -> list[Finding]:
    """pip-audit's JSON against the pins. A package that the report lacks was not audited: `failure` says why."""
    reported: dict[str, dict[str, Any]] = {}
    if report:
        reported = {str(entry["name"]).lower(): entry for entry in json.loads(report)["dependencies"]}
    result = []
    for name, version in sorted(pinned.items()):
        entry = reported.get(name, {"skip_reason": failure or "pip-audit does not mention it"})
        advisories = tuple(str(advisory["id"]) for advisory in entry.get("vulns", ()))
        result.append(Finding(name, version, advisories, str(entry.get("skip_reason", ""))))
    return result


def verdict(found: Sequence[Finding]) -> int:
    """The exit status."""
    if any(finding.vulnerabilities for finding in found):
        return 1
    return 2 if any(finding.not_audited for finding in found) or not found else 0


def audit(pinned: Mapping[str, str], command: Sequence[str]) -> list[Finding]:
    """Run pip-audit over the pins; whatever goes wrong leaves packages unaudited, never clean."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()), encoding="utf-8")
        options = [
            "--requirement",
            str(requirements),
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--progress-spinner",
            "off",
        ]
        try:
            run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return findings(pinned, "", f"pip-audit did not run: {error}")
    report = run.stdout if run.stdout.lstrip().startswith("{") else ""
    last_words = (run.stderr.strip().splitlines() or ["without a word"])[-1]
    return findings(pinned, report, "" if report else f"pip-audit failed: {last_words[:200]}")


def main() -> int:
    """Print every package that is not clean, and the count."""
    found = audit(pins(CONSTRAINTS.read_text(encoding="utf-8")), [sys.executable, "-m", "pip_audit"])
    for finding in found:
        if finding.vulnerabilities:
            print(f"VULNERABLE   {finding.name} {finding.version}: {', '.join(finding.vulnerabilities)}")
        elif finding.not_audited:
            print(f"not audited  {finding.name} {finding.version}: {finding.not_audited}")
    vulnerable = sum(bool(finding.vulnerabilities) for finding in found)
    unaudited = sum(bool(finding.not_audited) for finding in found)
    print(
        f"{len(found)} pinned packages: {len(found) - unaudited} audited, {vulnerable} vulnerable, {unaudited} not audited"
    )
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
