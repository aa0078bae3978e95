"""The policy as Serve calls it: real contexts, real threads, a fast clock; never an exception, never a wait."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle as cloudpickle
from ray.serve._private.common import TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingPolicy

from app.autoscaling import publish
from app.autoscaling.decision_log import read_log, verify
from app.autoscaling.feed import OFFERED
from app.autoscaling.planner import PoolPlan
from app.autoscaling.serve_policy import FleetAutoscaler
from app.autoscaling.settings import POLICY_PATH
from app.cost.profile import Birth, Profile
from tests.app.autoscaling.contexts import FakePool
from tests.app.test_imports import loaded_by

SETTINGS: dict[str, Any] = {
    "pools": {"a": {"capacity_per_s": 50, "startup_s": 60}, "b": {"capacity_per_s": 50, "startup_s": 60}},
    "interval_s": 10,
    "hold_s": 60,
    "warm_up_s": 30,
    "idle_s": 60,
    "patience": 2,
    "clock_scale": 100,
    "stale_after_s": 0.4,
}


class Controller:
    """Calls the policy as Serve's controller does and carries its targets out at once."""

    def __init__(self, pools: list[FakePool], /, **settings: Any) -> None:
        self.pools = pools
        self.published: list[dict[str, PoolPlan]] = []
        raw = FleetAutoscaler(**{**SETTINGS, **settings})
        self.policy: Any = _apply_app_level_autoscaling_config(raw)
        self.threads = [thread for thread in threading.enumerate() if thread.name == "autoscaling"]
        self.longest_s = 0.0

    def tick(self) -> None:
        now_s = time.time()
        for pool in self.pools:
            pool.advance(now_s)
        contexts = {pool.id: pool.context(now_s) for pool in self.pools}
        begin = time.perf_counter()
        targets, _ = self.policy(contexts)
        self.longest_s = max(self.longest_s, time.perf_counter() - begin)
        for pool in self.pools:
            pool.target = max(pool.minimum, min(pool.maximum, targets[pool.id]))
            pool.set_running(pool.target)

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.tick()  # once at least, however late it is
        while time.monotonic() < end:
            time.sleep(0.01)
            self.tick()

    def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, [(pool.id.name, pool.target) for pool in self.pools]
            self.tick()
            time.sleep(0.01)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, PoolPlan]]:
    """What the policy publishes, instead of Ray's store."""
    seen: list[dict[str, PoolPlan]] = []
    monkeypatch.setattr(publish.Publisher, "publish", lambda self, plans: seen.append(dict(plans)))
    return seen


@pytest.fixture
def controller(plans: list[dict[str, PoolPlan]]) -> Iterator[Callable[..., Controller]]:
    made: list[Controller] = []

    def make(*pools: FakePool, **settings: Any) -> Controller:
        made.append(Controller(list(pools), **settings))
        made[-1].published = plans
        return made[-1]

    yield make
    threads = [thread for one in made for thread in one.threads]
    made.clear()
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a policy that Serve forgot still has its thread"


def pool(name: str, **values: Any) -> FakePool:
    return FakePool(name, time.time(), **values)


def test_follows_the_load_up_and_down_and_replays_bit_for_bit(controller: Callable[..., Controller], tmp_path: Path) -> None:
    a, b, ingress = pool("a"), pool("b", minimum=0), pool("ingress", target=2, running=2)
    a.rate_per_s = 120.0
    serve = controller(a, b, ingress, log_path=str(tmp_path / "log"))
    serve.until(lambda: a.target == 3)
    serve.until(lambda: b.target == 0)
    serve.until(lambda: serve.published[-1]["a"].offered_per_s == pytest.approx(120, rel=0.25))
    a.rate_per_s = 480.0
    serve.until(lambda: a.target >= 10)
    a.rate_per_s = 0.0
    serve.until(lambda: a.target == 1)
    assert ingress.target == 2  # not a pool of the policy: untouched
    verdict = verify(tmp_path / "log")
    assert verdict.num_decisions > 10
    assert verdict.num_different == 0


class TalkingPool(FakePool):
    """Its replicas also count one pair: characters and tokens of every sentence, `length` source tokens each."""

    length = 20.0

    def series(self) -> Mapping[str, Any]:
        found = dict(super().series())
        per_sentence = {
            "offered_sentences": 1.0,
            "offered_chars": 80.0,
            "finished_chars": 80.0,
            "source_tokens": self.length,
            "target_tokens": self.length,
        }
        for name, each in per_sentence.items():
            found[f"pair eng_Latn-deu_Latn {name}"] = {
                replica: [TimeStampedValue(point.timestamp, point.value * each) for point in points]
                for replica, points in found[OFFERED].items()
            }
        return found


def test_a_profile_and_the_lengths_seen_set_the_count_and_the_log_needs_neither(
    controller: Callable[..., Controller], tmp_path: Path
) -> None:
    """60-token sentences where 20 were expected: more replicas than the start's capacity asks for; decided again from the
    log alone, after the profile is gone.
    """
    path = tmp_path / "profile.json"
    measured = Profile("d", "m", "w8a16", 4, False, 0.01, 1e-4, 0.0, 0.004, 1e-4, 60.0, 1e9, 32, Birth("", "", "", ""), {})
    measured.save(path)
    expected, real = (measured.capacity_per_s(n, n, 1.0) for n in (20, 60))
    a = TalkingPool("a", time.time(), maximum=40)
    a.length, a.rate_per_s = 60.0, 0.9 * expected
    assert real < 0.4 * expected
    pools = {"a": {"profile": str(path), "startup_s": 60, "source_tokens": 20, "target_tokens": 20}}
    serve = controller(a, pools=pools, log_path=str(tmp_path / "log"), lengths_path=str(tmp_path / "lengths.json"))
    wanted = math.ceil(a.rate_per_s / real)
    serve.until(lambda: a.target >= wanted)
    path.unlink()
    verdict = verify(tmp_path / "log")
    assert verdict.num_decisions > 3
    assert verdict.num_different == 0
    capacities = {tuple(record["capacity"]) for record in read_log(tmp_path / "log")[1]}
    assert (expected / 100,) in capacities
    assert min(capacities)[0] * 100 == pytest.approx(real, rel=0.02)


def test_a_profile_that_cannot_be_read_is_said_and_counts_stay(
    controller: Callable[..., Controller], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(publish.Publisher, "_put", lambda self, value: said.append(value))
    a = pool("a", running=4, target=4)
    pools = {"a": {"profile": str(tmp_path / "gone.json"), "startup_s": 60, "source_tokens": 20, "target_tokens": 20}}
    serve = controller(a, pools=pools)
    serve.until(lambda: bool(said))
    assert "gone.json" in said[0]["broken"]
    assert a.target == 4


def test_edits_by_hand_are_undone_and_new_limits_obeyed(controller: Callable[..., Controller]) -> None:
    a = pool("a")
    a.rate_per_s = 120.0
    serve = controller(a)
    serve.until(lambda: a.target == 3)
    for edited in (9, 1):
        a.target = edited
        a.set_running(edited)
        serve.until(lambda: a.target == 3)
    a.minimum = a.target = 5
    serve.run(0.4)
    assert a.target == 5
    a.minimum, a.maximum = 1, 2
    serve.run(0.1)
    assert a.target == 2


def test_a_pool_that_serve_woke_is_not_put_back_to_sleep(controller: Callable[..., Controller]) -> None:
    a, b = pool("a"), pool("b", minimum=0)
    a.rate_per_s = 30.0
    serve = controller(a, b, interval_s=60)
    serve.until(lambda: b.target == 0)
    b.queued = 1.0  # Serve's own fast path starts a replica at once
    serve.tick()
    assert b.target == 1
    serve.run(0.3)  # now it serves the request, and the last plan still says zero
    assert b.target == 1
    b.queued = 0.0
    serve.until(lambda: b.target == 0)


def test_silence_holds_every_count(controller: Callable[..., Controller]) -> None:
    a, b = pool("a"), pool("b")
    a.rate_per_s = 220.0
    serve = controller(a, b)
    serve.until(lambda: a.target >= 5)
    for one in (a, b):
        one.report, one.rate_per_s = False, 0.0
    serve.until(lambda: serve.published[-1]["a"].reason == "no_metrics")
    held = a.target
    serve.run(1.0)
    assert (a.target, b.target) == (held, 1)
    assert serve.published[-1]["a"].reason == "no_metrics"


def test_a_new_policy_object_goes_on_where_the_old_one_stopped(
    controller: Callable[..., Controller], tmp_path: Path
) -> None:
    a = pool("a")
    a.rate_per_s = 220.0
    first = controller(a, log_path=str(tmp_path / "log"))
    first.until(lambda: a.target >= 5)
    before = first.published[-1]["a"]
    first.policy = None  # Serve redeploys: the old policy is forgotten
    second = controller(a, log_path=str(tmp_path / "log"))
    num_published = len(second.published)
    second.until(lambda: len(second.published) > num_published)
    after = second.published[-1]["a"]
    assert after.state == "deciding"
    assert after.forecast_per_s == pytest.approx(before.forecast_per_s, rel=0.2)
    assert verify(tmp_path / "log").num_different == 0


def test_wrong_settings_hold_and_are_shown(controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[dict[str, Any]] = []
    monkeypatch.setattr(publish.Publisher, "_put", lambda self, value: stored.append(value))
    a = pool("a", target=4, running=4)
    serve = controller(a, intervall_s=3)
    serve.until(lambda: bool(stored))
    serve.run(0.2)
    assert a.target == 4
    assert len(stored) == 1
    assert "intervall_s" in stored[0]["broken"]


def test_nothing_that_breaks_reaches_serve(controller: Callable[..., Controller], caplog: pytest.LogCaptureFixture) -> None:
    a = pool("a", target=3, running=3)
    serve = controller(a)
    context = a.context(time.time())
    context.__dict__["raw_metrics"] = 7  # what snapshot reads
    context.running_replicas = None  # type: ignore[assignment]
    assert serve.policy({a.id: context})[0] == {a.id: 3}
    assert "replica counts stay as they are" in caplog.text
    caplog.clear()  # its traceback holds the policy


def test_a_planner_that_is_stuck_is_not_followed_for_ever(
    controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.autoscaling.planner._PLAN_LASTS", 0.5)
    a = pool("a")
    a.rate_per_s = 120.0
    serve = controller(a)
    serve.until(lambda: a.target == 3)
    is_stuck = threading.Event()
    monkeypatch.setattr("app.autoscaling.planner.FleetPlanner._decide", lambda *_: is_stuck.set())
    assert is_stuck.wait(60)  # the last decision is behind it
    time.sleep(0.6)
    a.target = 7
    a.set_running(7)
    serve.tick()
    assert a.target == 7


def test_serve_can_pickle_it_and_loads_no_torch() -> None:
    policy = AutoscalingPolicy(policy_function=POLICY_PATH, policy_kwargs=SETTINGS)
    assert cloudpickle.loads(policy.get_serialized_policy_def()).__name__ == "FleetAutoscaler"
    assert not loaded_by("import app.autoscaling.serve_policy, app.status") & {"torch", "transformers", "triton"}
