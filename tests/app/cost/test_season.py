"""The seasonal rule: against a slow twin, ahead of a daily rise, blind to the clock and to the future."""

from __future__ import annotations

import numpy as np
import pytest

from app.cost.demand import DemandHistory, HorizonSpec
from app.cost.forecast import DemandForecaster, ForecastOptions
from app.cost.judge import JudgeSpec
from app.cost.policy import QuantilePolicy, Sizing, SizingOptions
from app.cost.replay import Observation, Outcome, replay
from app.cost.traces import Floats, Ints
from app.cost.tuning import Recording, replay_forecasts

HORIZON = HorizonSpec(startup_s=1200, length_s=600, interval_s=600)
DAY = 144  # slots
SEASON = ForecastOptions(forest_share=0.0, rule="season", step_headroom=1.0)
PEAK = ForecastOptions(forest_share=0.0)


def rising_daily(days: int, seed: int = 0, pools: int = 1) -> Ints:
    """Requests per slot [K, pools]: 20/s, and 60/s from slot 60 to 72 of each day, Poisson."""
    day = np.full(DAY, 20.0 * HORIZON.interval_s)
    day[60:72] *= 3
    return np.random.default_rng(seed).poisson(np.tile(day, days)[:, None].repeat(pools, 1)).astype(np.int64)


def slow_seasonal_peak(offered: Floats, horizon: HorizonSpec) -> float:
    """The rule from its sentence, one earlier day at a time, over one pool's requests per slot."""
    slots, window = len(offered), max(1, round(180 / horizon.interval_s))

    def rate(end: int) -> float:
        return float(offered[end - window : end].sum()) / (window * horizon.interval_s)

    ahead = -(-horizon.startup_s // horizon.interval_s) + max(1, round(horizon.length_s / horizon.interval_s)) + window
    day, candidates = 86_400 // horizon.interval_s, []
    for back in [day * n for n in range(1, 8)] + [7 * day * n for n in range(1, 5)]:
        then = slots - back
        if then >= window and back >= ahead:
            highest = max(rate(end) for end in range(then, then + ahead + 1))
            candidates.append(highest * min(rate(slots) / max(rate(then), 1e-3), 4.0))
    return max([rate(slots), *candidates]) if candidates else float("nan")


@pytest.mark.parametrize("horizon", [HORIZON, HorizonSpec(1000, 0, 900), HorizonSpec(600, 90_000, 3600)])
def test_the_peak_is_that_of_the_slow_twin(horizon: HorizonSpec) -> None:
    rng = np.random.default_rng(3)
    days = 30
    count = 86_400 // horizon.interval_s * days
    offered = rng.poisson(40 * np.exp(rng.normal(0, 0.5, (count, 2)))).astype(np.int64)
    offered[: count // 2 : 7, 1] = 0
    history = DemandHistory(2, horizon, capacity_slots=16)
    seen = 0
    for end in [1, 3, *np.linspace(count // 40, count, 40).astype(int).tolist()]:
        for row in offered[seen:end]:
            history.push(row)
        seen = end
        twin = [slow_seasonal_peak(offered[:end, pool].astype(float), horizon) for pool in range(2)]
        np.testing.assert_allclose(history.seasonal_peak(), twin, rtol=1e-12)
    assert np.isfinite(twin).all()


def run(offered: Ints, options: ForecastOptions) -> Outcome:
    arrivals = offered.repeat(HORIZON.interval_s, 0) // HORIZON.interval_s
    policy = QuantilePolicy(DemandForecaster(1, HORIZON, options), Sizing(4.0, SizingOptions(scale=1.1)))
    return replay(arrivals, policy, JudgeSpec(4.0, HORIZON.startup_s, HORIZON.interval_s), offered[0])


def test_a_daily_rise_is_there_before_it_comes_once_it_was_seen() -> None:
    offered = rising_daily(3)
    season, peak = run(offered, SEASON), run(offered, PEAK)
    late = {name: outcome.slot_late.reshape(3, DAY).sum(1) for name, outcome in (("season", season), ("peak", peak))}
    assert late["season"][0] > 0  # nobody can know the first
    assert late["season"][1:].sum() == 0
    assert (late["peak"] > 0).all()
    ready = season.ready[DAY : 2 * DAY, 0]
    assert ready[60] >= 15  # 60/s need 15 replicas, at once
    assert ready[55] <= 7  # and not before the order had to be placed
    assert ready[80:].max() <= 7


def test_shifting_the_clock_or_the_day_changes_no_decision() -> None:
    offered = rising_daily(3, seed=1)
    decided = []
    for shift in (0.0, 137.0, 43_200.0, 1e9):
        policy = QuantilePolicy(DemandForecaster(1, HORIZON, SEASON), Sizing(4.0, SizingOptions()))
        zero, one = np.zeros(1), np.ones(1, np.int64)
        decided.append(
            [
                int(policy.decide(Observation(slot * 600 + shift, row, zero, zero, one, 0 * one))[0])
                for slot, row in enumerate(offered)
            ]
        )
    assert decided[0] == decided[1] == decided[2] == decided[3]
    assert len(set(decided[0])) > 3


def test_a_forecast_uses_nothing_from_its_own_slot_or_later() -> None:
    offered = rising_daily(2, seed=2)
    changed, cut = offered.copy(), DAY + 40
    changed[cut:] *= 5
    first, second = (
        np.array([forecaster.observe(row)[0] for row in series])
        for series in (offered, changed)
        for forecaster in [DemandForecaster(1, HORIZON, SEASON)]
    )
    np.testing.assert_array_equal(first[:cut], second[:cut])
    assert np.all(first[cut : cut + 5] < second[cut : cut + 5])


def test_batch_forecasts_are_the_live_ones_bit_for_bit() -> None:
    offered = rising_daily(4, seed=4, pools=2)
    begin, scales = 2 * DAY, np.array([1.0, 1.2])
    recording = Recording.of(offered, HORIZON, "season")
    given = np.stack([recording.walked(pool, SEASON, begin - 1, len(offered) - 1) for pool in range(2)], 1)
    arrivals = offered.repeat(HORIZON.interval_s, 0) // HORIZON.interval_s
    arrivals[begin * HORIZON.interval_s :: HORIZON.interval_s] += (offered % HORIZON.interval_s)[begin:]
    spec, judged = JudgeSpec(4.0, HORIZON.startup_s, HORIZON.interval_s), slice(begin * HORIZON.interval_s, None)
    batch = replay_forecasts(arrivals[judged], given, spec, SizingOptions(), scales)
    for pool, scale in enumerate(scales.tolist()):
        policy = QuantilePolicy(DemandForecaster(1, HORIZON, SEASON), Sizing(4.0, SizingOptions(scale=scale)))
        for row in offered[: begin - 1, pool : pool + 1]:
            policy.forecaster.observe(row)
        live = replay(arrivals[judged, pool : pool + 1], policy, spec, offered[begin - 1, pool : pool + 1])
        np.testing.assert_array_equal(live.total[:, 0], batch.total[:, pool])
        np.testing.assert_array_equal(live.slot_late[:, 0], batch.slot_late[:, pool])
    assert np.ptp(batch.total) > 5


def test_another_level_than_that_day_is_not_scaled_without_bound() -> None:
    offered = np.concatenate([np.zeros((60, 1), np.int64), np.full((DAY - 60, 1), 600), np.full((50, 1), 60_000)])
    forecaster = DemandForecaster(1, HORIZON, SEASON)
    forecast = np.array([forecaster.observe(row)[0] for row in offered])
    # 100/s now; that day's 0/s grew to 1/s, a growth without limit. No more than the present level may be expected.
    assert forecast[-1] == pytest.approx(100.0)
    for _ in range(DAY):
        forecast = forecaster.observe(np.zeros(1, np.int64))
    assert forecast[0] < 0.1  # a dead pool is not kept up by its past


def test_a_jump_that_no_day_has_seen_is_ordered_for_in_the_next_slot() -> None:
    offered = np.concatenate([np.full(1500, 12_000), [48_000]])[:, None]
    got = {}
    for headroom in (0.0, 1.0, 2.0):
        options = ForecastOptions(forest_share=0.0, rule="season", step_headroom=headroom)
        forecaster = DemandForecaster(1, HorizonSpec(1200, 60, 60), options)  # 1440 slots a day, three to the mean
        for row in offered // 10:
            forecast = forecaster.observe(row)
        got[headroom] = float(forecast[0])
    assert got[0.0] == pytest.approx(40.0, rel=0.01)  # the mean of three slots lags
    assert 74 < got[1.0] < 80  # 80/s, less what counting may be wrong by
    assert got[2.0] == pytest.approx(2 * got[1.0])


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="rule is 'mean'"):
        ForecastOptions(rule="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_headroom"):
        ForecastOptions(step_headroom=-1.0)
    recording = Recording.of(rising_daily(1)[:50], HORIZON)
    with pytest.raises(ValueError, match="record it anew"):
        recording.walked(0, SEASON, 10, 20)
