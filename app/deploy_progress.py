"""How far Serve has come with a deployment, and why it failed, in words without a replica's stack trace."""

from __future__ import annotations

import re
from typing import Any

_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_FRAME = re.compile(r'^ +File ".*", line \d+')
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class DeployFailedError(RuntimeError):
    """An application did not start; the message says which deployments, and the errors that ended them."""


def all_running(status: Any) -> bool:
    """True when every application of a `serve.status()` runs. Raises DeployFailedError when one failed."""
    for name, application in status.applications.items():
        if application.status in _FAILED:
            reasons = _reasons(application) or [last_error(application.message)]
            raise DeployFailedError(f"application {name} failed: {'; '.join(reasons)}")
    return bool(status.applications) and all(a.status == "RUNNING" for a in status.applications.values())


def what_is_missing(status: Any) -> str:
    """Deployments that are not healthy yet, with Serve's own message where it has one."""
    return "; ".join(reason for application in status.applications.values() for reason in _reasons(application))


def _reasons(application: Any) -> list[str]:
    return [
        f"{name}: {last_error(deployment.message) or deployment.status}"
        for name, deployment in application.deployments.items()
        if deployment.status != "HEALTHY"
    ]


def last_error(message: str) -> str:
    """The error at the end of a message with stack traces, without its module's name; a message without any as it is."""
    lines = _ESCAPE.sub("", message).strip().splitlines()
    frames = [index for index, line in enumerate(lines) if _FRAME.match(line)]
    if not frames:
        return "\n".join(lines)
    rest = frames[-1] + 1
    while rest < len(lines) and lines[rest].startswith("    "):  # the line of code, and the marks below it
        rest += 1
    error = "\n".join(lines[rest:])
    return re.sub(r"^(?:\w+\.)+(?=\w+(?::|$))", "", error, count=1) or "\n".join(lines)
