"""The benchmark on a short trace: its line is the worst seed, and a seed's result depends on no other."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from app.cost import benchmark
from app.cost.benchmark import Group, Scenario, judge_group, main
from app.cost.forecast import ForecastOptions
from app.cost.policy import SizingOptions
from app.cost.traces import Trace


def short_trace() -> Trace:
    rng = np.random.default_rng(9)
    return Trace("short", 600, 60 * np.exp(rng.normal(0, 0.25, 48)), np.full(48, 1.5))


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> tuple[Group, ...]:
    forecast = ForecastOptions(num_trees=10, min_leaf=20, refit_s=3600)
    easy = Scenario("easy", "fifo", 0.9, 0.5, SizingOptions(), (1.0, 3.0, 0.1))
    strict = Scenario("strict", "bounded", 0.98, 0.5, SizingOptions(drain_s=0), (0.8, 3.0, 0.1))
    made = (Group("short", 60, 120, 4 * 3600, forecast, (easy, strict)),)
    monkeypatch.setattr(benchmark, "GROUPS", made)
    monkeypatch.setitem(benchmark._TRACES, "short", short_trace)
    return made


def test_the_last_line_is_the_worst_seed(groups: tuple[Group, ...], capsys: pytest.CaptureFixture[str]) -> None:
    judged = judge_group(groups[0], range(3), note=False)
    assert main(["--seeds", "3"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) == {"easy", "strict"}
    for name, result in judged.items():
        assert line[name]["cost_ratio"] == round(max(result.cost_ratio), 4)
        assert line[name]["attainment"] == round(min(result.attainment), 5)
        assert all(ratio >= 1 for ratio in result.over_fluid)
        assert 0.5 < max(result.cost_ratio) < 3
    assert main(["--seeds", "1", "--only", "nothing-like-it"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {}
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])


def test_a_seed_is_judged_the_same_alone_and_among_others(groups: tuple[Group, ...]) -> None:
    together, alone = judge_group(groups[0], range(3), note=False), judge_group(groups[0], [2], note=False)
    for name in together:
        assert together[name].cost_ratio[2] == alone[name].cost_ratio[0]
        assert together[name].attainment[2] == alone[name].attainment[0]


def test_others_are_printed_with_what_ours_saves(groups: tuple[Group, ...], capsys: pytest.CaptureFixture[str]) -> None:
    ours = judge_group(groups[0], range(2), note=False)["easy"].cost_ratio
    assert main(["--seeds", "2", "--others", "0.5,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    static = [line for line in lines if line.startswith("easy, ") and "static peak" in line]
    assert len(static) == 2
    assert static[0].partition("static")[2] == static[1].partition("static")[2]  # it knows no service time
    low, high, saved, most = (float(found) for found in re.findall(r"([-\d.]+)(?: to| of|% to|% cheaper)", static[0])[:4])
    assert 100 * (1 - ours[0] / low) == pytest.approx(saved, abs=0.1) or 100 * (1 - ours[1] / low) == pytest.approx(
        saved, abs=0.1
    )
    assert low <= high
    assert saved <= most
    uncapped = [line.partition("Ray")[2] for line in lines if line.startswith("easy, ") and "tuned, no cap" in line]
    assert uncapped[0] != uncapped[1]
    for wrong in ("0", "-1", "soon", "nan"):
        with pytest.raises(SystemExit):
            main(["--others", wrong])
