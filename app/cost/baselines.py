"""What others do, under the same rules: static peak, Ray Serve's rule, utilisation targets, last value, recent maximum.

Every policy takes its settings per pool (float64[P]), so that a whole grid of settings is replayed at once. Rates are
requests/s. Ongoing requests are those in service (rate times the service time, at most what the replicas hold) plus the
backlog.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from app.cost.judge import JudgeSpec
from app.cost.replay import Observation, Outcome, Policy, replay
from app.cost.traces import Floats, Ints

Settings = dict[str, Floats]


class Static:
    """`replicas` for ever."""

    def __init__(self, spec: JudgeSpec, settings: Settings) -> None:
        self._replicas = settings["replicas"].astype(np.int64)

    def decide(self, seen: Observation) -> Ints:
        """int64[P]."""
        return self._replicas


class LastValue:
    """The rate of the last `interval_s`, times `scale`; decided every `interval_s` seconds (Dynamo's `constant`)."""

    def __init__(self, spec: JudgeSpec, settings: Settings, interval_s: int = 180) -> None:
        self._spec, self._scale = spec, settings["scale"]
        self._slots = max(1, interval_s // spec.interval_s)
        self._seen: deque[Ints] = deque(maxlen=self._slots)
        self._count = 0
        self._wanted: Ints | None = None

    def decide(self, seen: Observation) -> Ints:
        """int64[P]."""
        self._seen.append(seen.offered)
        if self._wanted is None or self._count % self._slots == 0:
            rate = np.sum(self._seen, axis=0) / (len(self._seen) * self._spec.interval_s)
            self._wanted = np.ceil(rate * self._scale / self._spec.capacity_per_s).astype(np.int64)
        self._count += 1
        return self._wanted


class RecentMaximum:
    """The highest one-minute rate of the last `window_s` seconds, times `scale`."""

    def __init__(self, spec: JudgeSpec, settings: Settings, window_s: int = 600) -> None:
        self._spec, self._scale = spec, settings["scale"]
        self._minute: deque[Ints] = deque(maxlen=max(1, 60 // spec.interval_s))
        self._rates: deque[Floats] = deque(maxlen=max(1, window_s // spec.interval_s))

    def decide(self, seen: Observation) -> Ints:
        """int64[P]."""
        self._minute.append(seen.offered)
        self._rates.append(np.sum(self._minute, axis=0) / (len(self._minute) * self._spec.interval_s))
        peak = np.max(self._rates, axis=0)
        return np.asarray(np.ceil(peak * self._scale / self._spec.capacity_per_s).astype(np.int64))


class UtilisationTarget:
    """Kubernetes' HPA: ready replicas times utilisation over `target`, 10 % tolerance, the highest wish of 300 s."""

    def __init__(self, spec: JudgeSpec, settings: Settings) -> None:
        self._spec, self._target = spec, settings["target"]
        self._wishes: deque[Ints] = deque(maxlen=max(1, 300 // spec.interval_s))

    def decide(self, seen: Observation) -> Ints:
        """int64[P]."""
        ready = np.maximum(seen.ready, 1)
        busy = np.minimum(seen.offered / self._spec.interval_s + seen.backlog, ready * self._spec.capacity_per_s)
        ratio = busy / (ready * self._spec.capacity_per_s) / self._target
        wish = np.where(np.abs(ratio - 1) <= 0.1, seen.ready + seen.pending, np.ceil(ready * ratio)).astype(np.int64)
        self._wishes.append(wish)
        return np.asarray(np.max(self._wishes, axis=0))


class RayServe:
    """Ray Serve 2.60's default rule: ceil(ongoing averaged over 30 s / target), after `up_s` or `down_s` of agreeing
    decisions.

    target is a share of what a full replica holds, which is its capacity times service_s, the mean time in service; the
    shorter that is, the more replicas the same backlog asks for. max_replicas bounds the result.
    """

    def __init__(self, spec: JudgeSpec, settings: Settings) -> None:
        self._spec = spec
        self._service_s = settings["service_s"]
        self._target = settings["target"] * spec.capacity_per_s * self._service_s
        self._most = settings["max_replicas"]
        self._up, self._down = settings["up_s"] / spec.interval_s, settings["down_s"] / spec.interval_s
        self._ongoing: deque[Floats] = deque(maxlen=max(1, 30 // spec.interval_s))
        self._agreed = np.zeros(len(self._target))

    def decide(self, seen: Observation) -> Ints:
        """int64[P]."""
        current = seen.ready + seen.pending
        rate = np.minimum(seen.offered / self._spec.interval_s, np.maximum(seen.ready, 1) * self._spec.capacity_per_s)
        self._ongoing.append(rate * self._service_s + seen.backlog)
        wish = np.clip(np.ceil(np.mean(self._ongoing, axis=0) / self._target), self._spec.minimum, self._most)
        if not current.any():
            return np.asarray(wish.astype(np.int64))
        direction = np.sign(wish - current)
        self._agreed = np.where(direction == np.sign(self._agreed), self._agreed + direction, direction)
        move = (self._agreed >= self._up) & (direction > 0) | (-self._agreed >= self._down) & (direction < 0)
        self._agreed = np.where(move, 0.0, self._agreed)
        return np.where(move, wish, current).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A policy and the grid of settings it is tuned over."""

    name: str
    make: Callable[[JudgeSpec, Settings], Policy]
    grid: dict[str, Sequence[float]]

    def settings(self) -> Settings:
        """All combinations, float64[N] per setting."""
        rows = np.array(list(product(*self.grid.values())), np.float64)
        return {name: rows[:, column] for column, name in enumerate(self.grid)}


_SCALES = np.arange(1.0, 1.81, 0.02).tolist()
_TARGETS = np.arange(0.3, 1.0, 0.05).tolist()
_UNLIMITED = 1e6


def baselines(service_s: float) -> tuple[Baseline, ...]:
    """The policies to compare with. service_s: mean seconds a request is in service, which Ray Serve's rule counts."""
    ray: dict[str, Sequence[float]] = {
        "target": _TARGETS,
        "max_replicas": [_UNLIMITED],
        "up_s": [0, 30],
        "down_s": [60, 300, 600],
        "service_s": [service_s],
    }
    return (
        Baseline("static peak", Static, {"replicas": range(8, 45)}),
        Baseline("Ray Serve, default delays, no cap", RayServe, ray | {"up_s": [30], "down_s": [600]}),
        Baseline("Ray Serve, tuned, no cap", RayServe, ray),
        Baseline("Ray Serve, tuned on everything", RayServe, ray | {"max_replicas": [20, 25, 28, 31, 35]}),
        Baseline("HPA utilisation", UtilisationTarget, {"target": _TARGETS}),
        Baseline("last value, 180 s", LastValue, {"scale": _SCALES}),
        Baseline("maximum of 10 min", RecentMaximum, {"scale": _SCALES}),
    )


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """Cost in replica-seconds and attainment: with the setting tuned on the past, and with the best in hindsight (None if
    none).
    """

    name: str
    tuned_cost: float | None
    tuned_attainment: float | None
    hindsight_cost: float | None


def best_in_hindsight(baseline: Baseline, arrivals: Ints, spec: JudgeSpec, goal: float) -> float | None:
    """Replica-seconds of the cheapest setting that keeps the goal over arrivals int64[T]; None if none does."""
    return _cheapest(_replay_grid(baseline, baseline.settings(), arrivals, spec), goal)


def _cheapest(outcome: Outcome, goal: float) -> float | None:
    best = float(np.where(outcome.pool_attainment >= goal, outcome.replica_seconds, np.inf).min())
    return best if np.isfinite(best) else None


def judge_baseline(
    baseline: Baseline, past: Ints, judged: Ints, spec: JudgeSpec, goal: float, miss_share: float
) -> BaselineResult:
    """Replay the whole grid over past and judged int64[T] arrivals; the cheapest that keeps the tightened goal on the
    past is judged.
    """
    settings = baseline.settings()
    before, after = (_replay_grid(baseline, settings, arrivals, spec) for arrivals in (past, judged))
    result = BaselineResult(baseline.name, None, None, _cheapest(after, goal))
    tuned = np.where(before.pool_attainment >= 1 - (1 - goal) * miss_share, before.replica_seconds, np.inf)
    if not np.isfinite(tuned.min()):
        return result
    chosen = int(tuned.argmin())
    return replace(
        result, tuned_cost=float(after.replica_seconds[chosen]), tuned_attainment=float(after.pool_attainment[chosen])
    )


def _replay_grid(baseline: Baseline, settings: Settings, arrivals: Ints, spec: JudgeSpec) -> Outcome:
    count = len(next(iter(settings.values())))
    tiled = np.broadcast_to(arrivals[:, None], (len(arrivals), count))
    first = arrivals[: spec.interval_s].sum()
    return replay(tiled, baseline.make(spec, settings), spec, np.full(count, first))
