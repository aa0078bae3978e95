"""Known vulnerabilities of every pinned dependency: `make audit`, or `python -m tests.dependency_audit`.

pip-audit says "No known vulnerabilities found" and ends with 0 also when it could look up nothing. Here a package that was
not looked up is *not audited*, is listed, and counts: 0 means all were audited and none is known to be vulnerable, 1 that
one is, 2 that some could not be audited. What the first service does not know is asked of the second; arguments go to
pip-audit and replace both (`--vulnerability-service osv --osv-url URL`: a mirror of your own).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
_TIMEOUT_S = 600
_SERVICES = (("--vulnerability-service", "pypi"), ("--vulnerability-service", "osv"))
_NOBODY_ANSWERED = """No advisory service answered for any of {count} packages ({reason}).
An index that mirrors packages often has no advisories, and a firewall may stop the rest. Run it where the network reaches
its services, or name one that it does: make audit AUDIT_ARGS="--vulnerability-service osv --osv-url URL"."""


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


def audit_in_turn(pinned: Mapping[str, str], command: Sequence[str], services: Sequence[Sequence[str]]) -> list[Finding]:
    """Ask the first service about all pins, each further one about those that none before it knew."""
    found: dict[str, Finding] = {}
    left = dict(pinned)
    for service in services:
        for finding in audit(left, [*command, *service]):
            before = f"{found[finding.name].not_audited}; " if finding.name in found and finding.not_audited else ""
            found[finding.name] = replace(finding, not_audited=before + finding.not_audited)
        left = {name: version for name, version in left.items() if found[name].not_audited}
        if not left:
            break
    return [found[name] for name in sorted(found)]


def summary(found: Sequence[Finding]) -> str:
    """A line for every package that is not clean, and the count; one message where nothing at all was looked up."""
    vulnerable = [finding for finding in found if finding.vulnerabilities]
    unaudited = [finding for finding in found if finding.not_audited]
    lines = [f"VULNERABLE   {each.name} {each.version}: {', '.join(each.vulnerabilities)}" for each in vulnerable]
    if found and len(unaudited) == len(found):
        lines.append(_NOBODY_ANSWERED.format(count=len(found), reason=f"{found[0].name}: {found[0].not_audited}"))
    else:
        lines += [f"not audited  {each.name} {each.version}: {each.not_audited}" for each in unaudited]
    count = f"{len(found) - len(unaudited)} audited, {len(vulnerable)} vulnerable, {len(unaudited)} not audited"
    return "\n".join([*lines, f"{len(found)} pinned packages: {count}"])


def main(arguments: Sequence[str]) -> int:
    """Print every package that is not clean, and the count."""
    services = [arguments] if arguments else _SERVICES
    found = audit_in_turn(pins(CONSTRAINTS.read_text(encoding="utf-8")), [sys.executable, "-m", "pip_audit"], services)
    print(summary(found))
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
