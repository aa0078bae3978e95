"""The log proves decisions and remembers the past; tampering, crashes, strangers and second writers are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app.autoscaling.decision_log import DecisionLog, DecisionLogError, read_log, to_reading, to_record, verify
from app.autoscaling.feed import Reading
from app.autoscaling.settings import AutoscalingSettings
from app.cli import main
from app.cost.guards import Limits
from app.cost.replay import Observation

SETTINGS = AutoscalingSettings.model_validate(
    {
        "pools": {"a": {"capacity_per_s": 3.3, "startup_s": 60, "scale": 1.07}, "b": {"capacity_per_s": 7, "startup_s": 5}},
        "interval_s": 30,
        "hold_s": 60,
        "warm_up_s": 300,
    }
)


def readings(count: int) -> list[Reading]:
    """Awkward ones: clocks with many digits, gaps, silence, no replicas."""
    rng = np.random.default_rng(1)
    time_s, result = 1.7e9 + 1 / 3, []
    for slot in range(count):
        time_s += 30.0 * (7 if slot == 50 else 1) + rng.normal(0, 0.3)
        ready = rng.integers(0, 5, 2)
        seen = Observation(
            time_s,
            rng.poisson(200 + 100 * np.sin(slot / 9), 2),
            np.zeros(2),
            rng.exponential(3, 2),
            ready,
            rng.integers(0, 3, 2),
        )
        limits = Limits(np.array([1, 0]), np.array([9, 40]), rng.random(2) > 0.1)
        result.append(Reading(seen, limits, np.array([3.3, 7.0 + slot // 40 / 3])))
    return result


def write(path: Path, part: list[Reading]) -> list[dict[str, object]]:
    """As the planner does: learn the past, decide, append. Returns the lines of this part."""
    policy, lines = SETTINGS.policy(), []
    with DecisionLog(path, SETTINGS) as log:
        for past in log.past(lambda: False):
            policy.decide_on(past)
        for reading in part:
            decision = policy.decide_on(reading)
            log.append(reading, decision)
            lines.append(to_record(reading, decision))
    return lines


def test_a_run_decides_the_same_again_and_so_does_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decisions.jsonl"
    write(path, readings(200))
    verdict = verify(path)
    assert (verdict.num_decisions, verdict.num_different) == (200, 0)
    assert main(["replay-decisions", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "200 decisions, all equal bit for bit" in printed
    assert "no_metrics" in printed


def test_restarts_change_no_decision(tmp_path: Path) -> None:
    """Written in five lives, the file is the one of a single life."""
    whole = write(tmp_path / "one", readings(200))
    parts = []
    for begin in (0, 13, 60, 61, 150):
        end = {0: 13, 13: 60, 60: 61, 61: 150, 150: 200}[begin]
        parts += write(tmp_path / "five", readings(200)[begin:end])
    assert parts == whole
    assert (tmp_path / "five").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.parametrize(
    ("key", "value"), [("forecast", 1e-12), ("offered", 1), ("backlog", 1e-9), ("target", 1), ("capacity", -5)]
)
def test_the_smallest_change_is_found(tmp_path: Path, key: str, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decisions.jsonl"
    write(path, readings(120))
    lines = path.read_text().splitlines()
    record = json.loads(lines[80])
    index = record["known"].index(True)
    record[key][index] += value * (100 if key == "backlog" else 1)
    lines[80] = json.dumps(record, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    verdict = verify(path)
    if key != "backlog":  # a backlog matters only where it is large
        assert verdict.num_different > 0
        assert verdict.first_line is not None
        assert verdict.first_line >= 81
        assert main(["replay-decisions", str(path)]) == 1
        assert "decisions differ" in capsys.readouterr().out


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    whole = write(tmp_path / "whole", readings(60))
    write(path, readings(60)[:40])
    with path.open("ab") as file:
        file.write(b'{"time_s":1.0,"offered":[1')
    assert verify(path).num_decisions == 40
    assert write(path, readings(60)[40:]) == whole[40:]
    assert verify(path).num_decisions == 60


def test_other_settings_start_a_new_file_and_keep_the_old(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    write(path, readings(5))
    old = path.read_bytes()
    changed = SETTINGS.model_copy(update={"patience": 5})
    with DecisionLog(path, changed) as log:
        assert not log.resumable
        assert list(log.past(lambda: False)) == []
    assert (tmp_path / "decisions.jsonl.1").read_bytes() == old
    assert read_log(path)[0].patience == 5


def test_two_writers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.autoscaling.decision_log._LOCK_WAIT_S", 0.2)
    with DecisionLog(tmp_path / "log", SETTINGS), pytest.raises(DecisionLogError, match="being written"):
        DecisionLog(tmp_path / "log", SETTINGS)


def test_readings_survive_json_bit_for_bit() -> None:
    policy = SETTINGS.policy()
    for reading in readings(50):
        decision = policy.decide_on(reading)
        again = to_reading(json.loads(json.dumps(to_record(reading, decision))))
        assert again.seen.time_s == reading.seen.time_s
        np.testing.assert_array_equal(again.seen.backlog, reading.seen.backlog)
        np.testing.assert_array_equal(again.limits.known, reading.limits.known)
        np.testing.assert_array_equal(again.capacity, reading.capacity)


@pytest.mark.parametrize(
    "content", ["", "hello\n", "[]\n", '{"babelephant_decisions": 2}\n', '{"babelephant_decisions": 9}\n']
)
def test_other_files_are_named_as_such(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(DecisionLogError, match=r"no decision log|version 9"):
        read_log(path)
    assert main(["replay-decisions", str(path)]) == 2
    assert main(["replay-decisions", str(tmp_path / "none")]) == 2
    assert "log_path" in capsys.readouterr().err
