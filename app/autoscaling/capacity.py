"""Capacity of a replica while the service runs: the measured profile, and the lengths of what is asked for now.

    tokens of a pool's mean sentence = sum over pairs of characters offered * learnt tokens a character / sentences offered

The pool's capacity is that of its profile for such a sentence, by the function that `babelephant plan` calls. It is counted
again when the mean sentence has moved by more than 5 %, for one pool a decision, because it costs up to 0.3 s. Bounds: the
mean sentence stays within a quarter and four times of what the settings say, and a capacity of 0 is not believed.

Not corrected by the service's own speed: a replica that is not full does not show what it could do, and one that is full
refuses, where its rate is that of the longest queue and not that of the latency wanted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np

from app.autoscaling.feed import PoolSnapshot
from app.autoscaling.pair_counts import PairIncrease, PairMeter
from app.autoscaling.settings import AutoscalingSettings, PoolCapacity
from app.cost.lengths import LengthsError, PairLengths
from app.cost.profile import Profile
from app.cost.traces import Floats

log = logging.getLogger("ray.serve")

_MIX_HALF_LIFE_S = 3600.0
_LEAST_SENTENCES = 100.0  # seen, before a mean sentence is believed
_MOVED = 0.05
_FURTHEST = 4.0
_SAVE_EVERY_S = 600.0


class ReplicaCapacity:
    """Sentences per second of a replica, by pool. Raises ProfileError, LengthsError, OSError for files that cannot be used,
    ValueError when a pool's mean sentence alone takes longer than its slo_s.
    """

    def __init__(self, settings: AutoscalingSettings) -> None:
        self._settings = settings
        self._lengths_path = None if settings.lengths_path is None else settings.lengths_path.expanduser()
        self._saved_at_s: float | None = None
        if self._lengths_path is not None and self._lengths_path.exists():
            self._lengths = PairLengths.load(self._lengths_path)
        else:
            self._lengths = PairLengths(settings.lengths_half_life_s)
        self._pools = [_PoolCapacity(name, pool) for name, pool in settings.pools.items()]

    @property
    def per_s(self) -> Floats:
        """float64[P], of the policy's clock."""
        return np.array([pool.capacity_per_s for pool in self._pools]) / self._settings.clock_scale

    def resume(self, per_s: Floats) -> None:
        """Go on with the capacities of an earlier life's last decision until enough is seen; constants stay as set."""
        for pool, capacity in zip(self._pools, (per_s * self._settings.clock_scale).tolist(), strict=True):
            pool.resume(capacity)

    def observe(self, time_s: float, pools: Mapping[str, PoolSnapshot]) -> None:
        """Learn from what the replicas counted since the last call; time_s of the policy's clock."""
        learners = [pool for pool in self._pools if pool.profile is not None]
        for pool in learners:
            increases = pool.read(time_s, pools.get(pool.name))
            self._lengths.observe(time_s, {pair: increase.finished for pair, increase in increases.items()})
        for pool in learners:
            if pool.follow(self._lengths):
                break
        self._save(time_s)

    def _save(self, time_s: float) -> None:
        if self._lengths_path is None or not self._lengths.pairs:
            return
        if self._saved_at_s is not None and time_s - self._saved_at_s < _SAVE_EVERY_S:
            return
        self._saved_at_s = time_s
        try:
            self._lengths_path.parent.mkdir(parents=True, exist_ok=True)
            self._lengths.save(self._lengths_path)
        except OSError:
            log.exception("autoscaling: learnt lengths could not be written")


class _PoolCapacity:
    """One pool: the mix of the last hour, and the mean sentence that its capacity was counted for."""

    def __init__(self, name: str, pool: PoolCapacity) -> None:
        self.name = name
        self._pool = pool
        self.profile: Profile | None = None
        self._meter = PairMeter()
        self._time_s: float | None = None
        self._sentences = 0.0
        self._chars: dict[str, float] = {}
        self._counted_for: tuple[float, float] | None = None
        if pool.capacity_per_s is not None:
            self.capacity_per_s = pool.capacity_per_s
            return
        assert pool.profile and pool.source_tokens and pool.target_tokens  # checked by the settings
        self.profile = Profile.load(pool.profile.expanduser())
        self._start = (pool.source_tokens, pool.target_tokens)
        self.capacity_per_s = self._capacity(self._start)
        if self.capacity_per_s <= 0:
            raise _too_slow(name, pool)

    def resume(self, capacity_per_s: float) -> None:
        """See ReplicaCapacity."""
        if self.profile is not None:
            self.capacity_per_s = capacity_per_s

    def read(self, time_s: float, snapshot: PoolSnapshot | None) -> dict[str, PairIncrease]:
        """Take what was counted into the mix."""
        if snapshot is None:
            return {}
        fading = 1.0 if self._time_s is None else 0.5 ** (max(time_s - self._time_s, 0.0) / _MIX_HALF_LIFE_S)
        self._time_s = time_s
        self._sentences *= fading
        self._chars = {pair: kept for pair, chars in self._chars.items() if (kept := chars * fading) >= 1.0}
        increases = self._meter.read(snapshot.running, snapshot.series)
        for pair, increase in increases.items():
            self._sentences += increase.offered_sentences
            self._chars[pair] = self._chars.get(pair, 0.0) + increase.offered_chars
        return increases

    def follow(self, lengths: PairLengths) -> bool:
        """Count capacity again if the mean sentence has moved; True when that was done."""
        if self._sentences < _LEAST_SENTENCES or not self._chars:
            return False
        try:
            tokens = [lengths.estimate(pair).tokens(chars) for pair, chars in self._chars.items()]
        except LengthsError:
            return False
        sums = np.sum(tokens, axis=0) / self._sentences
        now = tuple(float(np.clip(s, a / _FURTHEST, a * _FURTHEST)) for s, a in zip(sums, self._start, strict=True))
        before = self._counted_for
        if before is not None and all(abs(math.log(a / b)) <= _MOVED for a, b in zip(now, before, strict=True)):
            return False
        self._counted_for = mean = (now[0], now[1])
        capacity = self._capacity(mean)
        if capacity <= 0:
            log.warning("autoscaling: pool %s: a sentence of %.1f > %.1f tokens takes longer than slo_s", self.name, *mean)
            return True
        log.info("autoscaling: pool %s: %.1f > %.1f tokens, %.3g sentences/s a replica", self.name, *mean, capacity)
        self.capacity_per_s = capacity
        return True

    def _capacity(self, mean: tuple[float, float]) -> float:
        assert self.profile is not None
        return self.profile.capacity_per_s(*mean, self._pool.slo_s, self._pool.arrival_cv2)


def check_files(settings: AutoscalingSettings) -> None:
    """Raise ProfileError, LengthsError, OSError for a file that the settings name and that cannot be used, or ValueError for
    a profile by which a pool's sentences take too long. Quick: the controller waits for it.
    """
    for name, pool in settings.pools.items():
        if pool.profile is not None and pool.source_tokens and pool.target_tokens:
            service = Profile.load(pool.profile.expanduser()).service(pool.source_tokens, pool.target_tokens)
            if service.tau0_s + service.alpha_s > pool.slo_s:
                raise _too_slow(name, pool)
    path = settings.lengths_path
    if path is not None and path.expanduser().exists():
        PairLengths.load(path.expanduser())


def _too_slow(name: str, pool: PoolCapacity) -> ValueError:
    return ValueError(
        f"pool {name}: a sentence of {pool.source_tokens:g} source and {pool.target_tokens:g} target tokens alone takes "
        f"longer than slo_s {pool.slo_s:g} by {pool.profile}; allow more time or take a faster device"
    )
