"""Which language pairs share a pool: the partition of the pairs that costs least.

Cost of a pool: replicas of the cheapest offer for it (the plan then mixes offers, within quotas), so many that

    n * capacity >= peak,    (n - lost) * capacity >= degraded share of the peak,    n >= 1

with one replica lost, or a zone of them. What pulls pairs together: fewer spare replicas and roundings, and peaks that do
not come at once, peak = sum of means + sqrt((1 - r) sum d^2 + r (sum d)^2), d = a pair's peak - mean and r the correlation.
What pulls them apart: a pool of few pairs touches fewer experts a step (app.cost.expert_usage), and short sentences need not
share batches with long ones. A thousandth of the cost before rounding is added, to tell partitions apart that round alike.

While searching (app.cost.partition: all partitions of up to 10 pairs, merging beyond), capacity is interpolated between
sizes of sentences and numbers of experts at which the plan's own is worked out. The answer is priced with the plan's own,
beside one pool for all and a pool for each, and the cheapest of the three is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from app.cost.expert_usage import EXPERTS_PER_TOKEN, ExpertUsage, experts_used, narrowed
from app.cost.fleet import PlanError
from app.cost.hardware import Offer
from app.cost.partition import Members, best_partition, merged_partition
from app.cost.plan import PlanRules
from app.cost.profile import Profile
from app.cost.traffic import Traffic

MOST_PAIRS_EXACT = 10
_UNROUNDED = 1e-3
_GRID_STEP = 1.4  # between sizes that capacity is interpolated between


@dataclass(frozen=True, slots=True)
class Pool:
    """Pairs that share replicas, the busiest first; rates in sentences per second, lengths of their mean sentence,
    experts_used as in app.cost.expert_usage (None: not measured), replicas of `offer`, each able to serve capacity_per_s.
    """

    name: str
    pairs: tuple[str, ...]
    peak_per_s: float
    mean_per_s: float
    source_chars: float
    source_tokens: float
    target_tokens: float
    experts_used: float | None
    offer: Offer
    replicas: int
    capacity_per_s: float

    @property
    def usd_per_hour(self) -> float:
        """Price of the replicas."""
        return self.replicas * self.offer.usd_per_hour


@dataclass(frozen=True, slots=True)
class Layout:
    """The answer, and the same pairs in one pool and in a pool each; num_experts of the model, None where no use of experts
    was measured; is_exact: all partitions were looked at.
    """

    pools: tuple[Pool, ...]
    together: tuple[Pool, ...]
    apart: tuple[Pool, ...]
    rules: PlanRules
    correlation: float
    num_experts: int | None
    experts_per_token: int
    is_exact: bool


class PoolCosts:
    """What pools of these pairs, which must have tokens, cost. Raises PlanError when nothing can serve a pair in time."""

    def __init__(
        self,
        traffic: Traffic,
        offers: Sequence[Offer],
        profiles: Mapping[str, Profile],
        rules: PlanRules,
        usage: ExpertUsage | None = None,
    ) -> None:
        self._pairs, self._correlation, self._rules = traffic.pairs, traffic.correlation, rules
        self._offers = [offer for offer in offers if offer.gpu in profiles]
        if not self._offers:
            raise PlanError("no GPU has both a price and a profile")
        self._profiles = profiles
        self.num_experts = None if usage is None else usage.num_experts
        self.experts_per_token = EXPERTS_PER_TOKEN if usage is None else usage.experts_per_token
        self._mean = np.array([demand.mean_per_s for demand in self._pairs])
        self._above = np.array([demand.peak_per_s for demand in self._pairs]) - self._mean
        self._sentence = np.array([(d.source_chars, d.source_tokens, d.target_tokens) for d in self._pairs], np.float64)
        self._shares = None if usage is None else np.array([usage.shares(demand.pair) for demand in self._pairs])
        self._at = cache(self._at_grid_point)

    def __call__(self, members: Members) -> float:
        """USD per hour while searching."""
        _, source, target = self._mean_sentence(members)
        used = self._used(members)
        capacity = {gpu: self._interpolated(gpu, source, target, used) for gpu in {offer.gpu for offer in self._offers}}
        return self._cheapest(members, capacity)[2]

    def pool(self, members: Members, name: str) -> Pool:
        """A pool with the capacity that the plan gives it."""
        chars, source, target = self._mean_sentence(members)
        used = self._used(members)
        capacity = {gpu: self._capacity(gpu, source, target, used) for gpu in {offer.gpu for offer in self._offers}}
        offer, replicas, _ = self._cheapest(members, capacity)
        busiest_first = sorted(members, key=lambda i: -self._mean[i])
        pairs = tuple(self._pairs[i].pair for i in busiest_first)
        mean = float(self._mean[busiest_first].sum())
        lengths = (chars, source, target)
        return Pool(name, pairs, self._peak(members), mean, *lengths, used, offer, replicas, capacity[offer.gpu])

    def _cheapest(self, members: Members, capacity: Mapping[str, float]) -> tuple[Offer, int, float]:
        """(offer, replicas, USD per hour with the thousandth before rounding)."""
        peak, found = self._peak(members), []
        for offer in self._offers:
            if (each := capacity[offer.gpu]) > 0:
                replicas = replicas_needed(peak, each, self._rules)
                found.append((offer, replicas, offer.usd_per_hour * (replicas + _UNROUNDED * peak / each)))
        if not found:
            pairs = [self._pairs[i].pair for i in sorted(members)]
            raise PlanError(f"no GPU translates the mean sentence of {', '.join(pairs[:3])} within {self._rules.slo_s:g} s")
        return min(found, key=lambda each: each[2])

    def _peak(self, members: Members) -> float:
        chosen = list(members)
        above = self._above[chosen]
        spread = (1 - self._correlation) * (above**2).sum() + self._correlation * above.sum() ** 2
        return float(self._mean[chosen].sum() + math.sqrt(spread))

    def _mean_sentence(self, members: Members) -> tuple[float, float, float]:
        """Characters, source and target tokens."""
        chosen = list(members)
        chars, source, target = (self._mean[chosen] @ self._sentence[chosen] / self._mean[chosen].sum()).tolist()
        return chars, source, target

    def _used(self, members: Members) -> float | None:
        if self._shares is None:
            return None
        chosen = list(members)
        weights = self._mean[chosen] * self._sentence[chosen, 2]
        return experts_used(np.tensordot(weights / weights.sum(), self._shares[chosen], 1), self.experts_per_token)

    def _capacity(self, gpu: str, source: float, target: float, used: float | None) -> float:
        profile = self._profiles[gpu]
        if used is not None and self.num_experts is not None:
            profile = narrowed(profile, used, self.num_experts, self.experts_per_token)
        return profile.capacity_per_s(source, target, self._rules.slo_s)

    def _at_grid_point(self, gpu: str, *steps: int) -> float:
        source, target, *used = (_GRID_STEP**step for step in steps)
        most = self.num_experts or 0
        return self._capacity(gpu, source, target, min(max(used[0], self.experts_per_token), most) if used else None)

    def _interpolated(self, gpu: str, source: float, target: float, used: float | None) -> float:
        """Capacity by a straight line in all logarithms; the plan's own where a corner serves nothing in time."""
        sizes = [math.log(size, _GRID_STEP) for size in (source, target, *(() if used is None else (used,)))]
        corners = [(math.floor(size), size - math.floor(size)) for size in sizes]
        total = 0.0
        for ups in product((0, 1), repeat=len(corners)):
            weight = math.prod(part if up else 1 - part for up, (_, part) in zip(ups, corners, strict=True))
            capacity = self._at(gpu, *(low + up for up, (low, _) in zip(ups, corners, strict=True)))
            if capacity <= 0:
                return self._capacity(gpu, source, target, used)
            total += weight * math.log(capacity)
        return math.exp(total)


def replicas_needed(peak_per_s: float, capacity_per_s: float, rules: PlanRules) -> int:
    """Fewest replicas of one kind for a pool, see the module docstring."""
    replicas = max(1, math.ceil(peak_per_s / capacity_per_s - 1e-9))
    while True:
        lost = 1 if rules.zones == 1 else -(-replicas // rules.zones)
        if (replicas - lost) * capacity_per_s >= rules.degraded_share * peak_per_s - 1e-9:
            return replicas
        replicas += 1


def make_layout(
    traffic: Traffic,
    offers: Sequence[Offer],
    profiles: Mapping[str, Profile],
    rules: PlanRules,
    usage: ExpertUsage | None = None,
) -> Layout:
    """The cheapest of what the search finds, one pool for all pairs, and a pool for each. Raises PlanError."""
    costs, count = PoolCosts(traffic, offers, profiles, rules, usage), len(traffic.pairs)
    is_exact = count <= MOST_PAIRS_EXACT
    apart = _named(costs, [frozenset([i]) for i in range(count)])
    together = _named(costs, [frozenset(range(count))])
    found = _named(costs, (best_partition if is_exact else merged_partition)(count, costs))
    best = min((together, found, apart), key=usd_per_hour)  # of equals the simplest
    return Layout(best, together, apart, rules, traffic.correlation, costs.num_experts, costs.experts_per_token, is_exact)


def usd_per_hour(pools: Sequence[Pool]) -> float:
    """Of all of them."""
    return sum(pool.usd_per_hour for pool in pools)


def _named(costs: PoolCosts, partition: Sequence[Members]) -> tuple[Pool, ...]:
    """Pools, the busiest first: `pool-1`, `pool-2`, ..., a pool of one pair by the pair's name."""
    pools = sorted((costs.pool(members, "") for members in partition), key=lambda pool: -pool.mean_per_s)
    names = [pool.pairs[0] if len(pool.pairs) == 1 else f"pool-{number}" for number, pool in enumerate(pools, 1)]
    return tuple(replace(pool, name=name) for pool, name in zip(pools, names, strict=True))


def table(layout: Layout) -> str:
    """The layout in words and numbers, for a terminal."""
    header = f"{'pool':<20} {'mean/s':>8} {'peak/s':>8} {'tokens':>13} {'experts':>8} {'GPU':<10} {'each/s':>8}"
    rows = [f"{header} {'replicas':>8} {'USD/h':>8}  pairs", *map(_row, layout.pools)]
    total = usd_per_hour(layout.pools)
    choices = {"this layout": layout.pools, "all pairs in one pool": layout.together, "a pool for each": layout.apart}
    others = [
        f"{name:<22} {usd_per_hour(pools):>9.2f} USD/h, {len(pools):>3} pools  {usd_per_hour(pools) / total - 1:>+7.1%}"
        for name, pools in choices.items()
    ]
    search = "all partitions were looked at" if layout.is_exact else "by merging and moving pairs"
    notes = [
        f"{layout.rules.degraded_share:.0%} of each pool's peak is served after losing a "
        + ("replica" if layout.rules.zones == 1 else f"zone of {layout.rules.zones}")
        + f"; the pairs' peaks have a correlation of {layout.correlation:.2f}; {search}",
        "experts: not measured, so a pool of few pairs is not taken to be faster: babelephant experts --out FILE measures"
        if layout.num_experts is None
        else f"experts: as many of {layout.num_experts} in a layer, used evenly, are touched as often",
    ]
    return "\n".join([*rows, "", *others, "", *notes])


def _row(pool: Pool) -> str:
    tokens = f"{pool.source_tokens:.1f} > {pool.target_tokens:.1f}"
    used = "-" if pool.experts_used is None else f"{pool.experts_used:.1f}"
    shown = ", ".join(pool.pairs[:3]) + (f" and {len(pool.pairs) - 3} more" if len(pool.pairs) > 3 else "")
    return (
        f"{pool.name:<20} {pool.mean_per_s:>8.2f} {pool.peak_per_s:>8.2f} {tokens:>13} {used:>8} {pool.offer.gpu:<10}"
        f" {pool.capacity_per_s:>8.1f} {pool.replicas:>8} {pool.usd_per_hour:>8.2f}  {shown}"
    )


def as_pools_file(layout: Layout) -> str:
    """YAML for `babelephant plan`, with each pool's pairs in comments, as `pairs:` of the Serve config has them."""
    lines = ["# babelephant plan --layout"]
    for pool in layout.pools:
        lines.append(f"# {pool.name}: pairs: [{', '.join(pool.pairs)}]")
        numbers = {
            name: getattr(pool, name)
            for name in ("peak_per_s", "mean_per_s", "source_chars", "source_tokens", "target_tokens")
        }
        if pool.experts_used is not None and layout.num_experts is not None:
            numbers |= {"experts_used": pool.experts_used, "num_experts": layout.num_experts}
            numbers |= {"experts_per_token": layout.experts_per_token}
        lines.append(f"- {{name: {pool.name}, {', '.join(f'{name}: {value:.6g}' for name, value in numbers.items())}}}")
    return "\n".join(lines) + "\n"
