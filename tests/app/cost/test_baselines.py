"""Other systems' rules against hand-worked cases, the day-block interval, and the replay command on a small trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.cli import main
from app.cost.baselines import Baseline, LastValue, RayServe, RecentMaximum, Static, UtilisationTarget, judge_baseline
from app.cost.benchmark import day_block_interval
from app.cost.judge import Clairvoyant, JudgeSpec
from app.cost.replay import Observation, Policy

SPEC = JudgeSpec(10.0, startup_s=60, interval_s=10)


def ask(policy: Policy, offered_per_s: list[float], ready: int = 4, backlog: float = 0.0) -> list[int]:
    answers = []
    for index, rate in enumerate(offered_per_s):
        count = np.array([round(rate * 10)])
        seen = Observation(10.0 * index, count, np.zeros(1), np.array([backlog]), np.array([ready]), np.zeros(1, np.int64))
        answers.append(int(policy.decide(seen)[0]))
    return answers


def ray(target: float, most: float, up_s: float, down_s: float) -> RayServe:
    settings = {"target": target, "max_replicas": most, "up_s": up_s, "down_s": down_s, "service_s": 0.5}
    return RayServe(SPEC, {name: np.array([value]) for name, value in settings.items()})


def test_last_value_holds_for_its_interval() -> None:
    policy = LastValue(SPEC, {"scale": np.array([1.5])}, interval_s=30)
    assert ask(policy, [40, 10, 10, 10, 80, 80, 80]) == [6, 6, 6, 2, 2, 2, 12]


def test_recent_maximum_forgets_after_its_window() -> None:
    policy = RecentMaximum(JudgeSpec(10.0, interval_s=60), {"scale": np.array([1.0])}, window_s=120)
    answers = []
    for requests in (600, 3000, 600, 600, 600):
        zero = np.zeros(1)
        answers.append(
            int(policy.decide(Observation(0, np.array([requests]), zero, zero, zero.astype(int), zero.astype(int)))[0])
        )
    assert answers == [1, 5, 5, 1, 1]


def test_utilisation_target_has_its_tolerance_and_its_window() -> None:
    assert ask(UtilisationTarget(SPEC, {"target": np.array([0.5])}), [21, 40, 10])[0:3] == [4, 8, 8]


def test_ray_serve_orders_for_its_backlog_and_waits_for_its_delays() -> None:
    # 40/s in service for 0.5 s and 60 waiting are 80 ongoing; a full replica holds 5, half of it is 2.5.
    assert ask(ray(0.5, 100, 0, 0), [40], backlog=60) == [32]
    assert ask(ray(0.5, 20, 0, 0), [40], backlog=60) == [20]
    assert ask(ray(0.5, 100, 30, 0), [40] * 3, backlog=60) == [4, 4, 32]
    assert ask(ray(1.0, 100, 0, 40), [10] * 4) == [4, 4, 4, 1]


def test_a_baseline_is_tuned_on_the_past_and_judged_on_the_rest() -> None:
    rng = np.random.default_rng(0)
    past, judged = rng.poisson(55, 3000), rng.poisson(75, 3000)
    grid = Baseline("static", Static, {"replicas": range(4, 12)})
    result = judge_baseline(grid, past, judged, SPEC, 0.99, 0.5)
    assert result.tuned_cost == 6 * 3000
    assert result.tuned_attainment is not None
    assert result.tuned_attainment < 0.9
    assert result.hindsight_cost == 8 * 3000
    none = judge_baseline(Baseline("static", Static, {"replicas": [2]}), past, judged, SPEC, 0.99, 0.5)
    assert none.tuned_cost is None
    assert none.hindsight_cost is None


def test_the_interval_holds_the_ratio_and_widens_with_the_days() -> None:
    day = 8640
    rng = np.random.default_rng(1)
    levels = np.full(7 * day, 10)
    for spread in (0, 3):
        total = levels + 3 + np.repeat(rng.integers(-spread, spread + 1, 7), day)
        best = Clairvoyant(levels, 0, float(levels.sum() * 10), 0.0)
        interval = day_block_interval(total, best, SPEC)
        assert interval is not None
        low, high = interval
        assert low <= total.sum() / levels.sum() <= high
        assert (high > low) == bool(spread)
    assert day_block_interval(total[:day], best, SPEC) is None


def test_the_replay_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    rate = 900 * 60 * (1 + 0.4 * np.sin(np.arange(288 * 2) / 288 * 2 * np.pi)) * rng.lognormal(0, 0.05, 576)
    path, picture = tmp_path / "mine.csv", tmp_path / "plot.png"
    path.write_text("time,requests\n" + "".join(f"{300 * index},{value:.0f}\n" for index, value in enumerate(rate / 12)))
    assert main(["replay", str(path), "--startup", "60", "--goal", "0.95", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("this policy")).split()
    assert 0.8 < float(line[2]) < 1.6
    assert float(line[3].rstrip("%")) > 90
    assert picture.stat().st_size > 1000
    assert main(["replay", str(tmp_path / "none.csv")]) == 2
    assert main(["replay", str(path), "--tune-days", "2"]) == 2
    assert main(["replay", str(path), "--gpu", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
