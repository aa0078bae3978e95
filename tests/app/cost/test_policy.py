"""Forecast and policy: no leak of the clock, live equals replay bit for bit, a forest against a brute-force fit."""

from __future__ import annotations

import numpy as np
import pytest

from app.cost.boosting import BoostingOptions, fit_quantile_forest
from app.cost.demand import DemandHistory, HorizonSpec, RollingExtremes
from app.cost.forecast import DemandForecaster, ForecastOptions
from app.cost.judge import JudgeSpec
from app.cost.policy import QuantilePolicy, Sizing, SizingOptions
from app.cost.replay import Observation, replay
from app.cost.traces import Ints, Trace
from app.cost.tuning import Recording, replay_forecasts, tune_scales

HORIZON = HorizonSpec(startup_s=60, length_s=120, interval_s=30)
OPTIONS = ForecastOptions(num_trees=12, min_leaf=20, refit_s=6 * 3600, forest_share=0.7)


def steps(seed: int, hours: int, window_s: int = 600) -> Trace:
    rng = np.random.default_rng(seed)
    count = hours * 3600 // window_s
    return Trace("steps", window_s, 40 * np.exp(rng.normal(0, 0.3, count)), np.full(count, 1.5))


def offered_per_slot(seeds: list[int], hours: int) -> tuple[Ints, Ints]:
    arrivals = np.stack([steps(seed, hours).arrivals(seed) for seed in seeds], 1)
    return arrivals, arrivals.reshape(-1, HORIZON.interval_s, len(seeds)).sum(1)


def observation(time_s: float, offered: Ints, backlog: float = 0.0, ready: int = 1) -> Observation:
    zero = np.zeros(len(offered))
    return Observation(time_s, offered, zero, zero + backlog, np.full(len(offered), ready), np.zeros(len(offered), np.int64))


def test_shifting_the_clock_changes_no_decision() -> None:
    _, offered = offered_per_slot([1], 14)
    decided = []
    for shift in (0.0, 137.0, 600.0, 1e9):
        policy = QuantilePolicy(DemandForecaster(1, HORIZON, OPTIONS), Sizing(4.0, SizingOptions()))
        decided.append([int(policy.decide(observation(slot * 30 + shift, row))[0]) for slot, row in enumerate(offered)])
    assert decided[0] == decided[1] == decided[2] == decided[3]
    assert len(set(decided[0])) > 3


def test_a_decision_uses_nothing_from_its_own_slot_or_later() -> None:
    _, offered = offered_per_slot([2], 10)
    changed = offered.copy()
    changed[900:] *= 3
    forecasts = []
    for series in (offered, changed):
        forecaster = DemandForecaster(1, HORIZON, OPTIONS)
        forecasts.append(np.array([forecaster.observe(row)[0] for row in series]))
    np.testing.assert_array_equal(forecasts[0][:900], forecasts[1][:900])
    assert np.all(forecasts[0][900:910] < forecasts[1][900:910])


def test_window_edges_cannot_be_found() -> None:
    """With constant demand the forecast has no period of a window: means by position within 600 s agree."""
    trace = Trace("flat", 600, np.full(72, 50.0), np.ones(72))
    offered = trace.arrivals(3).reshape(-1, 30, 1).sum(1)
    forecaster = DemandForecaster(1, HORIZON, OPTIONS)
    forecast = np.array([forecaster.observe(row)[0] for row in offered])[480:]
    by_position = forecast[: len(forecast) // 20 * 20].reshape(-1, 20).mean(0)
    assert np.ptp(by_position) < 4 * forecast.std() / np.sqrt(len(forecast) / 20)


def test_batch_forecasts_are_the_live_ones_bit_for_bit() -> None:
    arrivals, offered = offered_per_slot([4, 5], 20)
    recording = Recording.of(offered, HORIZON)
    begin, slots = 12 * 120, len(offered)
    given = np.stack([recording.walked(pool, OPTIONS, begin - 1, slots - 1) for pool in range(2)], 1)
    spec = JudgeSpec(4.0, 60, 30)
    batch = replay_forecasts(arrivals[begin * 30 :], given, spec, SizingOptions(), np.array([1.0, 1.1]))
    for pool, scale in enumerate((1.0, 1.1)):
        policy = QuantilePolicy(DemandForecaster(1, HORIZON, OPTIONS), Sizing(4.0, SizingOptions(scale=scale)))
        for row in offered[: begin - 1, pool : pool + 1]:
            policy.forecaster.observe(row)
        live = replay(arrivals[begin * 30 :, pool : pool + 1], policy, spec, offered[begin - 1, pool : pool + 1])
        np.testing.assert_array_equal(live.total[:, 0], batch.total[:, pool])
        np.testing.assert_array_equal(live.slot_late[:, 0], batch.slot_late[:, pool])
    assert np.ptp(batch.total) > 4


def test_cross_validation_never_sees_its_fold() -> None:
    _, offered = offered_per_slot([6], 28)
    fold = np.linspace(0, len(offered), 8).astype(int)[6:8]  # the last: later rows' features would hold the change
    middle = int(fold.mean())
    changed = offered.copy()
    changed[middle : fold[1]] *= 3
    first, second = (
        Recording.of(series, HORIZON).cross_validated(0, OPTIONS, len(offered)) for series in (offered, changed)
    )
    np.testing.assert_array_equal(
        first[fold[0] : middle], second[fold[0] : middle]
    )  # this fold's forest did not see the change
    assert not np.array_equal(first[: fold[0]], second[: fold[0]])  # the others' did


def test_tuning_takes_the_smallest_scale_that_keeps_the_goal() -> None:
    arrivals, offered = offered_per_slot([7, 8], 8)
    plain = ForecastOptions(forest_share=0.0)
    forecast = np.stack([Recording.of(offered, HORIZON).untrained.demand(None, plain)[:-1, pool] for pool in range(2)], 1)
    spec, scales = JudgeSpec(4.0, 60, 30), np.arange(0.8, 1.6, 0.1)
    chosen = tune_scales(arrivals[30:], forecast, spec, SizingOptions(), scales, 0.98, 0.5)
    for pool, choice in enumerate(chosen):
        assert choice.attainment >= 0.99
        smaller = np.full(2, choice.scale - 0.1)
        worse = replay_forecasts(arrivals[30:], forecast, spec, SizingOptions(), smaller)
        assert choice.scale == scales[0] or worse.pool_attainment[pool] < 0.99
    with pytest.raises(ValueError, match="try larger"):
        tune_scales(arrivals[30:], forecast, spec, SizingOptions(), np.array([0.2]), 0.98, 0.5)


def test_sizing_orders_at_once_and_removes_after_patience() -> None:
    sizing = Sizing(10.0, SizingOptions(patience=3, drain_s=60))
    zero = np.zeros(1)
    current = np.array([4])
    got = []
    for demand in (40.0, 80.0, 40.0, 40.0, 40.0, 25.0, 41.0, 25.0, 25.0, 25.0):
        current = sizing.size(np.array([demand]), zero, current)
        got.append(int(current[0]))
    assert got == [4, 8, 8, 8, 4, 4, 5, 5, 5, 3]
    assert sizing.size(zero, np.array([600.0]), current).tolist() == [
        3
    ]  # 10/s more for a minute is one replica; patience holds
    assert sizing.size(np.array([30.0]), np.array([600.0]), current).tolist() == [4]
    assert sizing.size(np.array([30.0]), np.array([6e6]), current).tolist() == [6]  # a backlog at most doubles it


def test_a_step_is_ordered_once_and_in_full() -> None:
    offered = np.concatenate([np.full(400, 1500), np.full(6, 6000)])[:, None]
    policy = QuantilePolicy(DemandForecaster(1, HORIZON, OPTIONS), Sizing(10.0, SizingOptions(drain_s=0)))
    total = replay(offered.repeat(30, 0) // 30, policy, JudgeSpec(10.0, 60, 30), np.array([1500])).total[:, 0]
    assert total[400] <= 8
    assert total[401] >= 20  # the slot after the step: all of it, before any of it has started
    assert total.max() <= 1.35 * 20


def test_no_traffic_goes_to_the_minimum_and_a_step_is_capped() -> None:
    policy = QuantilePolicy(DemandForecaster(1, HORIZON, OPTIONS), Sizing(10.0, SizingOptions(minimum=2, max_step=3)))
    for slot in range(200):
        assert policy.decide(observation(slot * 30.0, np.zeros(1, np.int64), ready=2)).tolist() == [2]
    assert policy.decide(observation(6000.0, np.array([30_000]), ready=2)).tolist() == [5]


@pytest.mark.parametrize("windows", [[1, 2, 3, 7], [5], [8, 64, 63]])
def test_rolling_maxima_are_those_of_slices(windows: list[int]) -> None:
    values = np.random.default_rng(1).normal(size=(200, 3))
    rolling = RollingExtremes(3, np.array(windows))
    for end in range(1, 201):
        got = rolling.push(values[end - 1])
        for index, window in enumerate(windows):
            np.testing.assert_array_equal(got[index], values[max(0, end - window) : end].max(0))


def test_history_rates_are_those_of_slices() -> None:
    offered = np.random.default_rng(2).poisson(100, (300, 2))
    history = DemandHistory(2, HORIZON, capacity_slots=16)  # grows on the way
    bases = []
    for row in offered:
        features = history.push(row)
        bases.append(history.base)
    np.testing.assert_allclose(history.base, offered[-2:].mean(0) / 30)
    np.testing.assert_allclose(history.day_mean, offered.mean(0) / 30)
    np.testing.assert_allclose(history.highest_half_hour, np.max(bases[-60:], axis=0))
    np.testing.assert_allclose(features[:, 7], np.log(offered[-120:].mean(0) / 30 / history.base))  # the hour's mean
    growth = history.growth_target(np.array([50, 297]))
    np.testing.assert_allclose(growth[0], np.log(np.max(bases[53:57], axis=0) / bases[50]))
    assert np.isnan(growth[1]).all()


def test_a_forest_finds_conditional_quantiles() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (6000, 4))
    spread = np.where(rows[:, 2] > 0, 2.0, 0.5)
    target = rows[:, 0] + spread * rng.normal(size=6000)
    forest = fit_quantile_forest(rows, target, BoostingOptions(0.9, num_trees=150))
    fresh = rng.uniform(-0.9, 0.9, (4000, 4))
    truth = fresh[:, 0] + np.where(fresh[:, 2] > 0, 2.0, 0.5) * 1.2816
    assert np.abs(forest.predict(fresh) - truth).mean() < 0.25
    outcome = fresh[:, 0] + np.where(fresh[:, 2] > 0, 2.0, 0.5) * rng.normal(size=4000)
    assert abs((outcome <= forest.predict(fresh)).mean() - 0.9) < 0.015
    one_by_one = np.concatenate([forest.predict(row[None]) for row in fresh[:50]])
    np.testing.assert_array_equal(one_by_one, forest.predict(fresh)[:50])


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="quantile"):
        BoostingOptions(1.0)
    with pytest.raises(ValueError, match="forest_share"):
        ForecastOptions(forest_share=1.2)
    with pytest.raises(ValueError, match="scale"):
        SizingOptions(scale=0)
    with pytest.raises(ValueError, match="rows"):
        fit_quantile_forest(np.zeros((10, 2)), np.zeros(10), BoostingOptions(0.5))
