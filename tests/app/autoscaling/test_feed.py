"""Readings from replicas' counters: every sentence counts once, whatever the replicas' lives and reports look like."""

from __future__ import annotations

import numpy as np
import pytest

from app.autoscaling.feed import Feed, Reading, snapshot
from tests.app.autoscaling.contexts import FakePool

PERIOD_S = 0.5
STALE_S = 1.0
CAPACITY = np.array([5.0])


class Watch:
    """A clock, one pool and the feed that reads it."""

    def __init__(self, **pool: int) -> None:
        self.now_s = 1_000.0
        self.pool = FakePool("a", self.now_s, **pool)
        self.feed = Feed(["a"], PERIOD_S, STALE_S)

    def read(self, seconds: float = PERIOD_S) -> Reading:
        self.now_s += seconds
        self.pool.advance(self.now_s)
        return self.feed.read({"a": snapshot(self.pool.context(self.now_s))}, self.now_s, CAPACITY)

    def offered(self, seconds: float = PERIOD_S) -> int:
        return int(self.read(seconds).seen.offered[0])


def test_a_slot_holds_what_all_replicas_were_offered() -> None:
    watch = Watch(running=3, target=4, minimum=2, maximum=9)
    watch.pool.rate_per_s = 600.0
    watch.pool.waiting, watch.pool.queued = 7.0, 5.0
    watch.read(3.0)
    reading = watch.read()
    assert reading.limits.known.tolist() == [True]
    assert reading.seen.offered.tolist() == [300]
    assert reading.seen.backlog.tolist() == [3 * 7 + 5]
    assert (reading.seen.ready.tolist(), reading.seen.pending.tolist()) == ([3], [1])
    assert (reading.limits.minimum.tolist(), reading.limits.maximum.tolist()) == ([2], [9])


def test_over_a_life_of_changes_the_sum_is_what_was_offered() -> None:
    """Rates, new replicas and reports that lag: the sum over slots is the true one within one slot's worth."""
    watch = Watch(running=1, target=1)
    total, true = 0, 0.0
    watch.read(2.0)
    for slot in range(40):
        watch.pool.rate_per_s = 50.0 + 10 * (slot % 7)
        if slot == 15:
            watch.pool.set_running(3)
        before = sum(watch.pool.counts.values())
        total += watch.offered()
        true += sum(watch.pool.counts.values()) - before
    assert total == pytest.approx(true, abs=3 * 110 * PERIOD_S)


def test_a_new_replica_counts_from_its_first_report() -> None:
    watch = Watch(running=0, target=1)
    assert watch.read().limits.known.tolist() == [False]
    watch.pool.set_running(1)
    watch.pool.rate_per_s = 1000.0
    assert watch.offered(0.3) == 300  # all it was ever offered
    assert watch.offered(0.6) == pytest.approx(500, abs=60)


def test_a_controller_that_starts_late_reads_rates_and_no_totals() -> None:
    watch = Watch(running=1)
    watch.pool.rate_per_s = 100.0
    watch.now_s += 500.0
    watch.pool.advance(watch.now_s)
    assert watch.offered() == pytest.approx(50, abs=6)
    watch.pool.points["a#1"] = watch.pool.points["a#1"][-1:]  # a single point: the mean of its life
    reading = watch.feed.read({"a": snapshot(watch.pool.context(watch.now_s))}, 0.0, CAPACITY)
    assert reading.seen.offered[0] == pytest.approx(50, abs=1)


def test_silence_is_no_zero_and_its_end_is_no_burst() -> None:
    watch = Watch(running=2, target=2)
    watch.pool.rate_per_s = 200.0
    watch.read(2.0)
    watch.pool.report = False
    assert watch.read(0.5).seen.offered.tolist() == [100]  # not stale yet: the last rate
    silent = watch.read(1.0)
    assert silent.limits.known.tolist() == [False]
    watch.read(30.0)
    watch.pool.report = True
    assert watch.offered() == pytest.approx(100, abs=12)


def test_one_silent_replica_makes_the_pool_unknown_but_a_new_one_may_be_silent() -> None:
    watch = Watch(running=2, target=3)
    watch.read(0.1)
    watch.read(2.0)
    watch.pool.set_running(3)
    assert watch.read(0.0).limits.known.tolist() == [True]
    points = watch.pool.points["a#1"]
    watch.pool.points["a#1"] = []  # an old one goes silent
    assert watch.read(0.0).limits.known.tolist() == [False]
    watch.pool.points["a#1"] = points
    watch.pool.report = False  # the new one never reports
    watch.now_s += STALE_S + 0.01
    context = watch.pool.context(watch.now_s)
    fresh = [(watch.now_s, 0.0)]
    watch.pool.points |= {"a#1": fresh, "a#2": fresh}
    assert watch.feed.read({"a": snapshot(context)}, 0.0, CAPACITY).limits.known.tolist() == [False]


def test_no_replicas_wanted_is_known_and_an_undeployed_pool_is_not() -> None:
    watch = Watch(running=0, target=0, minimum=0)
    watch.pool.queued = 2.0
    reading = watch.read()
    assert (reading.limits.known.tolist(), reading.seen.backlog.tolist()) == ([True], [2.0])
    missing = watch.feed.read({}, 0.0, CAPACITY)
    assert missing.limits.known.tolist() == [False]
    assert missing.limits.maximum.tolist() == [0]
    assert missing.seen.pending.tolist() == [0]


def test_a_broken_number_is_no_report() -> None:
    watch = Watch(running=1)
    watch.pool.rate_per_s = 10.0
    watch.read(2.0)
    watch.pool.counts["a#1"] = float("nan")
    watch.read(0.1)
    assert watch.read(2.0).limits.known.tolist() == [False]
