"""The Dockerfile: hadolint, and the promises that no linter knows. No image is built here: this needs a container engine."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.cluster_configs.folder import CONFIGS, load, tool

DOCKERFILE = CONFIGS / "docker/Dockerfile"
IGNORED = CONFIGS / "docker/Dockerfile.dockerignore"
_KEYWORDS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "SHELL", "STOPSIGNAL",
    "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, continuation lines joined. ValueError for an unknown keyword."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = []
    for logical in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, _, rest = logical.partition(" ")
        if keyword not in _KEYWORDS:
            raise ValueError(f"unknown instruction {keyword!r}")
        found.append((keyword, rest.strip()))
    return found


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    return instructions(DOCKERFILE.read_text())


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("hadolint"), "--no-color", "--format=json", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_hadolint_has_no_complaint() -> None:
    result = hadolint(DOCKERFILE)
    assert (result.returncode, json.loads(result.stdout)) == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [("WORKDIR /app", "WORKDIR app", "DL3000"), ("HEALTHCHECK", "HEALTCHECK", "DL1000"), ("--yes ", "", "DL3014")],
)
def test_hadolint_finds_mistakes(tmp_path: Path, old: str, new: str, rule: str) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace(old, new))
    assert rule in {finding["code"] for finding in json.loads(hadolint(broken).stdout)}


def test_the_parser_refuses_a_misspelt_instruction() -> None:
    with pytest.raises(ValueError, match="HEALTCHECK"):
        instructions(DOCKERFILE.read_text().replace("HEALTHCHECK", "HEALTCHECK"))


def test_base_is_a_pinned_cuda_runtime(steps: list[tuple[str, str]]) -> None:
    assert steps[0] == ("ARG", "CUDA_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04")
    assert next(rest for keyword, rest in steps if keyword == "FROM").startswith("${CUDA_IMAGE} ")


def test_dependencies_come_before_code_and_from_the_constraints(steps: list[tuple[str, str]]) -> None:
    (install,) = [i for i, (keyword, rest) in enumerate(steps) if keyword == "RUN" and "pip install" in rest]
    assert "--constraint constraints.txt" in steps[install][1]
    code = [
        i
        for i, (keyword, rest) in enumerate(steps)
        if keyword == "COPY" and rest.startswith(("app/", "engine/", "kernels/"))
    ]
    assert len(code) == 3 and min(code) > install


def test_runs_as_a_number_that_is_not_root_and_that_the_pods_use(steps: list[tuple[str, str]]) -> None:
    users = [rest for keyword, rest in steps if keyword == "USER"]
    assert users == ["10001:10001"]
    head = load(CONFIGS / "kuberay/base/rayservice.yaml")["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["template"]["spec"]["securityContext"]["runAsUser"] == 10001
    after = [keyword for keyword, _ in steps[[k for k, _ in steps].index("USER") :]]
    assert "RUN" not in after  # nothing is done as root once the user is set


def test_health_is_readiness(steps: list[tuple[str, str]]) -> None:
    (check,) = [rest for keyword, rest in steps if keyword == "HEALTHCHECK"]
    assert "http://127.0.0.1:8000/readyz" in check
    command = json.loads(check.split("CMD ", 1)[1])
    compile(command[2], "healthcheck", "exec")


def test_everything_that_is_copied_exists_and_is_sent_to_the_builder(steps: list[tuple[str, str]]) -> None:
    allowed = [line[1:] for line in IGNORED.read_text().splitlines() if line.startswith("!")]
    sources = [
        source for keyword, rest in steps if keyword == "COPY" and "--from" not in rest for source in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "app/"} <= set(sources)
    for source in sources:
        assert (CONFIGS.parent / source).exists(), source
        assert source in allowed or f"{source}**" in allowed, source


def test_the_install_layer_has_what_the_build_reads(steps: list[tuple[str, str]]) -> None:
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    first_copy = next(rest for keyword, rest in steps if keyword == "COPY").split()
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= set(first_copy)
    (install,) = [rest for keyword, rest in steps if "pip install" in rest]
    for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        assert f"{pattern.rstrip('*')}/__init__.py" in install, f"{pattern} would be missing from the editable install"


def test_nothing_secret_and_no_private_index(steps: list[tuple[str, str]]) -> None:
    text = DOCKERFILE.read_text()
    assert not re.search(r"https?://(?!127\.0\.0\.1)", text)
    assert not re.search(r"(?i)(password|secret|api_key)\s*=", text)
