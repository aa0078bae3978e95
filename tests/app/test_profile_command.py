"""`babelephant profile` on a tiny model and on random weights, and the capacity check's live runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.capacity_check import CapacityReport, Cell, CellResult, run_live
from app.cli import main
from app.cost.profile import Profile
from app.engine_timing import CpuClock
from engine.config import EngineConfig
from engine.translator import Translator
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import write_tiny_tokenizer

SMALL = ["--precision", "fp32", "--rounds", "3", "--max-rows", "8", "--beam-size", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3, eos_bias=4.0))


def test_a_checkpoint_is_profiled(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", str(checkpoint), *SMALL, "--name", "L4", "--note", "a test", "--out", str(out)]) == 0
    profile = Profile.load(out)
    assert (profile.device, profile.beam_size, profile.max_batch, profile.estimated) == ("L4", 2, 4, False)
    assert [rows for rows, _ in profile.step_points] == [2.0, 4.0, 8.0]
    assert profile.born.method.endswith("a test")
    assert profile.startup_s > 0.5  # a process that imports torch
    assert profile.memory_bytes > 1e7
    assert "per decode step" in capsys.readouterr().out


def test_a_shape_is_profiled(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--shape", "tiny", *SMALL, "--cpu-time", "--out", str(out)]) == 0
    profile = Profile.load(out)
    assert profile.model == "shape tiny"
    assert "random weights" in profile.born.method
    assert profile.capacity_per_s(10, 10, slo_s=60.0) > 0


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--rounds", "1"],
        ["--beam-size", "0"],
        ["--cpu-time", "--threads", "2"],
        ["--shape", "tiny", "--validate"],
    ):
        assert main(["profile", *options]) == 2
    assert "random model" in capsys.readouterr().err


def test_live_latency_counts_from_the_intended_instant(checkpoint: Path) -> None:
    translator = Translator.load(checkpoint, EngineConfig(precision="fp32", max_rows=2))
    cell = Cell("eng_Latn", "fra_Latn", "short", 2)
    latency = run_live(translator, ["hello"] * 3, cell, np.array([0.0, 0.0, 500.0]), CpuClock())
    assert np.isfinite(latency).all()
    assert latency[1] > latency[0]  # one sentence's beams fill the engine
    assert latency[2] < 100  # the idle time before it is not its own


def test_the_report_judges_medians() -> None:
    cell = Cell("a", "b", "short", 1)
    good = CellResult(cell, p99=[0.5, 1.1, 1.12], rate=[1.0, 1.05, 2.0], live_p99_s=[1.0], live_rate_per_s=[2.0])
    bad = CellResult(cell, p99=[1.2, 1.2, 1.0], rate=[1.0], live_p99_s=[1.0], live_rate_per_s=[2.0])
    assert good.passed
    assert not CapacityReport((good, bad)).passed
    assert "1 of 2 cells" in CapacityReport((good, bad)).table()
