"""`babelephant profile` on a tiny model and on random weights, and the capacity check's live runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.capacity_check import CapacityReport, Cell, CellResult, run_live
from app.cli import main
from app.cost.profile import Profile
from app.engine_timing import LENGTH_STEP, CpuClock, EngineTimer
from engine.config import EngineConfig, ModelConfig
from engine.kv_cache import LENGTH_STEP as CACHE_STEP
from engine.runner import Runner
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
    assert profile.length_step == LENGTH_STEP == CACHE_STEP
    assert "per decode step" in capsys.readouterr().out


def test_a_shape_is_profiled(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--shape", "tiny", *SMALL, "--cpu-time", "--out", str(out)]) == 0
    profile = Profile.load(out)
    assert profile.model == "shape tiny"
    assert "random weights" in profile.born.method
    assert profile.capacity_per_s(10, 10, slo_s=60.0) > 0


def test_what_is_timed_is_what_the_engine_did(checkpoint: Path) -> None:
    """Rows, cached tokens and passes of a load, beside those that the runner was given."""
    config = EngineConfig(precision="fp32", max_rows=6, max_source_slots=3)
    runner = Runner.load(checkpoint, config)
    timer = EngineTimer(runner, ModelConfig.from_checkpoint(checkpoint), config, 2, CpuClock())
    seen_rows, seen_cells, seen_passes = [], [], []
    inputs, encode = runner._search.inputs, runner.encode

    def watched_inputs() -> object:
        given = inputs()
        rows = runner._search.num_rows
        seen_rows.append(rows)
        longest = int(given.positions.max()) + 1
        seen_cells.append(rows * -(-longest // 16) * 16)
        return given

    def watched_encode(batch: object) -> None:
        seen_passes.append(tuple(np.diff(batch.source_offsets).tolist()))  # type: ignore[attr-defined]
        encode(batch)  # type: ignore[arg-type]

    runner._search.inputs, runner.encode = watched_inputs, watched_encode  # type: ignore[method-assign, assignment]
    timings = [timing for load in timer.measure(12) for timing in load]
    assert [timing.rows for timing in timings] == [(rows,) for rows in seen_rows]
    assert [timing.target_cells for timing in timings] == seen_cells
    assert [lengths for timing in timings for lengths in timing.passes] == seen_passes
    assert set(seen_rows) == {2, 4, 6}
    assert max(seen_cells) > 16 * 6
    assert all(timing.seconds > 0 for timing in timings)


def test_a_fault_while_timing_is_not_a_timing(checkpoint: Path) -> None:
    config = EngineConfig(precision="fp32", max_rows=2)
    runner = Runner.load(checkpoint, config)

    def broken() -> None:
        raise RuntimeError("no")

    runner.decode = broken  # type: ignore[method-assign, assignment]
    timer = EngineTimer(runner, ModelConfig.from_checkpoint(checkpoint), config, 2)
    with pytest.raises(RuntimeError, match="start sentences over"):
        list(timer.measure(3))


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


def test_turns_do_not_count_in_a_live_run(checkpoint: Path) -> None:
    translator = Translator.load(checkpoint, EngineConfig(precision="fp32", max_rows=2))
    cell = Cell("eng_Latn", "fra_Latn", "short", 2)
    turns = []

    def turn(clock: object) -> None:
        turns.append(clock.now())  # type: ignore[attr-defined]
        clock.wait(1000.0)  # type: ignore[attr-defined]

    clock = CpuClock()
    latency = run_live(translator, ["hello"] * 3, cell, np.array([0.0, 5.0, 10.0]), clock, turn)
    assert len(turns) >= 2
    assert latency.max() < 100
    assert clock.now() > 1000


def test_the_report_judges_medians() -> None:
    cell = Cell("a", "b", "short", 1)
    good = CellResult(cell, p99=[0.5, 1.1, 1.12], rate=[1.0, 1.05, 2.0], live_p99_s=[1.0], live_rate_per_s=[2.0])
    bad = CellResult(cell, p99=[1.2, 1.2, 1.0], rate=[1.0], live_p99_s=[1.0], live_rate_per_s=[2.0])
    assert good.passed
    assert not CapacityReport((good, bad)).passed
    assert "1 of 2 cells" in CapacityReport((good, bad)).table()
