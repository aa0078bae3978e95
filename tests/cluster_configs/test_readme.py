"""The README names every file, and nothing that does not exist."""

from __future__ import annotations

import re

import pytest

from tests.cluster_configs.folder import CONFIGS

TEXT = (CONFIGS / "README.md").read_text(encoding="utf-8")
_GENERATED = {"__pycache__"}


def test_paths_exist() -> None:
    named = set(re.findall(r"`((?:serve|kuberay|launcher|docker|prometheus|grafana|systemd)/[\w./-]*\w)`", TEXT))
    assert len(named) > 10
    assert [path for path in named if not (CONFIGS / path).exists()] == []
    for path in re.findall(r"(?<!tests/)cluster_configs/[\w./-]*\w", TEXT):
        assert (CONFIGS.parent / path).exists(), path


@pytest.mark.parametrize("folder", ["kuberay/overlays", "kuberay/components", "serve", "launcher", "prometheus", "systemd"])
def test_nothing_is_left_out(folder: str) -> None:
    for path in (CONFIGS / folder).iterdir():
        if path.name not in _GENERATED:
            assert path.name in TEXT or path.stem in TEXT, path
