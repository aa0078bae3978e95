"""The birth certificate of a measurement: which commit, and whether the code was that commit's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kernels.tune import certificate, commit_of

AUTHOR = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *AUTHOR, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_changed_tree_is_named_dirty(tmp_path: Path) -> None:
    file = tmp_path / "part" / "tune.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    git(tmp_path, "init", "--quiet")
    assert commit_of(file) == "not in a git checkout"  # below one, but not of it
    git(tmp_path, "add", "part/tune.py")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    git(tmp_path, "tag", "v1")  # a name is no hash
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit_of(file) == commit
    (tmp_path / "note").touch()  # nobody's code
    assert commit_of(file) == commit
    file.write_text("a = 2\n")
    assert commit_of(file) == f"{commit}-dirty"
    git(tmp_path, "add", "part/tune.py")
    assert commit_of(file) == f"{commit}-dirty"


def test_no_checkout_and_no_git_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tune.py").touch()
    assert commit_of(tmp_path / "tune.py") == "not in a git checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert certificate("card")["commit"] == "unknown: git is not installed"
