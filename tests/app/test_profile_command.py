"""`babelephant profile` on a tiny model and on random weights, and the report of the capacity check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.capacity_check import CapacityReport, CellResult
from app.cli import main
from app.clocks import CpuClock
from app.cost.profile import Profile
from app.engine_timing import LENGTH_STEP, EngineTimer
from app.live_run import Cell
from engine.config import EngineConfig, ModelConfig
from engine.kv_cache import LENGTH_STEP as CACHE_STEP
from engine.runner import Runner
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
    assert profile.startup_s > 0.1  # a process that imports torch, on the fastest machine
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
    seen_rows, seen_cells, seen_passes, seen_ended = [], [], [], []
    inputs, encode, advance = runner._search.inputs, runner.encode, runner._search.advance

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

    def watched_advance(logits: object) -> object:
        ended = advance(logits)  # type: ignore[arg-type]
        seen_ended.append(len(ended))
        return ended

    runner._search.inputs, runner.encode = watched_inputs, watched_encode  # type: ignore[method-assign, assignment]
    runner._search.advance = watched_advance  # type: ignore[method-assign, assignment]
    timings = [timing for load in timer.measure(12) for timing in load]
    steps = [timing for timing in timings if timing.rows]
    assert [timing.rows for timing in steps] == [(rows,) for rows in seen_rows]
    assert [timing.target_cells for timing in steps] == [(cells,) for cells in seen_cells]
    assert [timing.num_ended for timing in steps] == seen_ended
    passes = [timing for timing in timings if not timing.rows]
    assert [timing.passes for timing in passes] == [(lengths,) for lengths in seen_passes]
    assert sum(timing.num_started for timing in steps) == sum(map(len, seen_passes)) >= sum(seen_ended) > 0
    assert set(seen_rows) == {2, 4, 6}
    assert max(seen_cells) > 16 * 6
    assert all(timing.seconds > 0 for timing in timings)


class SlowTokenizer:
    """Takes a second to encode a text and ten to decode one."""

    languages = ("eng_Latn",)

    def __init__(self, clock: CpuClock) -> None:
        self.clock, self.num_words = clock, []

    def encode(self, text: str, src_lang: str) -> None:
        assert src_lang == "eng_Latn"
        self.num_words.append(len(text.split()))
        self.clock.wait(1.0)

    def decode(self, token_ids: object) -> str:
        self.clock.wait(10.0)
        return "x"


def test_tokenizing_is_in_the_timings_of_steps(checkpoint: Path) -> None:
    config, clock = EngineConfig(precision="fp32", max_rows=6, max_source_slots=3), CpuClock()
    tokenizer = SlowTokenizer(clock)
    runner = Runner.load(checkpoint, config)
    timer = EngineTimer(runner, ModelConfig.from_checkpoint(checkpoint), config, 2, clock, tokenizer)  # type: ignore[arg-type]
    timings = [timing for part in timer.measure(12) for timing in part]
    assert sum(timing.num_ended for timing in timings) > 5
    for timing in timings:
        assert 0 < timing.seconds - timing.num_started - 10 * timing.num_ended < 0.9
    lengths = [length for timing in timings for each in timing.passes for length in each]
    assert sorted(tokenizer.num_words) == sorted(lengths)


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


def test_the_report_judges_medians() -> None:
    cell, live = Cell("a", "b", "short", 1), {"live_p99_s": [1.0], "live_rate_per_s": [2.0]}
    good = CellResult(cell, p99=[0.5, 1.1, 1.12], rate=[1.0, 1.05, 2.0], steady_p99=[1.2], steady_rate=[1.0], **live)
    bad = CellResult(cell, p99=[1.2, 1.2, 1.0], rate=[1.0], steady_p99=[1.0], steady_rate=[1.2], **live)
    slow = CellResult(cell, p99=[1.0], rate=[0.89, 0.89, 1.0], steady_p99=[0.86], steady_rate=[0.91], **live)
    assert [result.passed for result in (good, bad, slow)] == [True, False, False]
    table = CapacityReport((good, bad, slow)).table()
    assert not CapacityReport((good, bad, slow)).passed
    assert CapacityReport((good,)).passed
    assert "1 of 3 cells" in table
    assert "\n1 if the machine" in table
