"""The plan: pools of language pairs to replicas per GPU type and purchase, with its working shown and its price per
character.

Capacity of a replica comes from its profile and the latency target (app.cost.profile, app.cost.queueing), never from a
flat utilisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from app.cost.expert_usage import EXPERTS_PER_TOKEN, narrowed
from app.cost.fleet import FleetPlan, FleetProblem, PlanError, solve_exact
from app.cost.hardware import Offer, PriceCatalogue, usd_per_million_chars
from app.cost.profile import Profile
from app.cost.traces import Floats

_POOL_FIELDS = ("name", "peak_per_s", "mean_per_s", "source_chars", "source_tokens", "target_tokens")


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """What one pool must serve. peak_per_s is the quantile to plan for and mean_per_s what is paid for, both sentences
    per second.

    source_chars, source_tokens, target_tokens: per sentence. minimum replicas; arrival_cv2 burstiness (1 is Poisson).
    experts_used of num_experts: where the use of experts was measured (app.cost.expert_usage), both or neither;
    experts_per_token of the model.
    """

    name: str
    peak_per_s: float
    mean_per_s: float
    source_chars: float
    source_tokens: float
    target_tokens: float
    minimum: int = 1
    arrival_cv2: float = 1.0
    experts_used: float | None = None
    num_experts: int | None = None
    experts_per_token: int = EXPERTS_PER_TOKEN

    def __post_init__(self) -> None:
        for field_name in _POOL_FIELDS[1:]:
            if not getattr(self, field_name) > 0:
                raise PlanError(f"pool {self.name}: {field_name} is {getattr(self, field_name)}; it must be positive")
        if self.mean_per_s > self.peak_per_s:
            raise PlanError(f"pool {self.name}: mean_per_s {self.mean_per_s} is above peak_per_s {self.peak_per_s}")
        if (self.experts_used is None) != (self.num_experts is None):
            raise PlanError(f"pool {self.name}: give experts_used and num_experts, or neither")
        if self.experts_per_token not in (1, 2):
            raise PlanError(f"pool {self.name}: experts_per_token is {self.experts_per_token}; choose 1 or 2")
        if self.experts_used is not None and not self.experts_used >= self.experts_per_token:
            raise PlanError(
                f"pool {self.name}: experts_used is {self.experts_used}; it must be at least {self.experts_per_token}"
            )

    def profile(self, profile: Profile) -> Profile:
        """A device's profile for the experts that this pool uses."""
        if self.experts_used is None or self.num_experts is None:
            return profile
        return narrowed(profile, self.experts_used, self.num_experts, self.experts_per_token)


@dataclass(frozen=True, slots=True)
class PlanRules:
    """slo_s p99 of a sentence; degraded_share of the peak that must still be served after one replica is lost (0: no
    N+1); zones that replicas are spread over: with more than 1, a whole zone may be lost.
    """

    slo_s: float = 1.0
    degraded_share: float = 0.8
    quotas: Mapping[str, int] | None = None
    zones: int = 1

    def __post_init__(self) -> None:
        if not self.slo_s > 0 or not 0 <= self.degraded_share <= 1:
            raise PlanError("slo_s must be positive and degraded_share between 0 and 1")
        if self.zones < 1:
            raise PlanError(f"zones is {self.zones}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One row of the answer: `replicas` of an offer for a pool, each able to serve capacity_per_s."""

    pool: PoolDemand
    offer: Offer
    replicas: int
    capacity_per_s: float
    estimated: bool
    why: str

    @property
    def usd_per_hour(self) -> float:
        """Price of these replicas."""
        return self.replicas * self.offer.usd_per_hour


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: its lines, the solver's result and what it costs."""

    lines: tuple[PlanLine, ...]
    pools: tuple[PoolDemand, ...]
    solved: FleetPlan
    rules: PlanRules
    catalogue: PriceCatalogue

    @property
    def usd_per_million_chars(self) -> float:
        """USD per million source characters at the mean load, paying for the whole fleet."""
        chars_per_s = sum(pool.mean_per_s * pool.source_chars for pool in self.pools)
        return usd_per_million_chars(self.solved.usd_per_hour, chars_per_s)


def read_pools(path: Path) -> list[PoolDemand]:
    """Pools from YAML: a list of mappings with PoolDemand's fields. Raises PlanError naming the pool and the field."""
    raw: Any = yaml.safe_load(path.read_text())
    if not isinstance(raw, list) or not raw:
        raise PlanError(f"{path}: must be a list of pools, each with {', '.join(_POOL_FIELDS)}")
    pools = []
    for index, entry in enumerate(raw):
        try:
            pools.append(PoolDemand(**entry))
        except TypeError as error:
            raise PlanError(
                f"{path}: pool {index + 1}: {error}; fields are {', '.join(_POOL_FIELDS)}, minimum, arrival_cv2, "
                "experts_used, num_experts, experts_per_token"
            ) from error
    return pools


def make_plan(
    pools: Sequence[PoolDemand],
    offers: Sequence[Offer],
    profiles: Mapping[str, Profile],
    rules: PlanRules,
    catalogue: PriceCatalogue,
) -> Plan:
    """The cheapest plan over offers whose GPU has a profile. Raises PlanError when there is none."""
    usable = [offer for offer in offers if offer.gpu in profiles]
    if not usable:
        raise PlanError(
            f"no GPU has both a price and a profile; priced: {', '.join(sorted({offer.gpu for offer in offers})) or 'none'}"
        )
    capacity = capacities(pools, usable, profiles, rules.slo_s)
    quotas = rules.quotas or {}
    if unknown := sorted(set(quotas) - {offer.gpu for offer in usable}):
        raise PlanError(f"quota for {', '.join(unknown)}, which is not among the planned GPUs")
    peak = np.array([pool.peak_per_s for pool in pools])
    problem = FleetProblem(
        demand=peak,
        degraded=rules.degraded_share * peak,
        minimum=np.array([pool.minimum for pool in pools]),
        capacity=capacity,
        price_usd_per_hour=np.array([offer.usd_per_hour for offer in usable]),
        quota=np.array([float(quotas.get(offer.gpu, np.inf)) for offer in usable]),
        zones=rules.zones,
    )
    solved = solve_exact(problem)
    lines = [
        PlanLine(
            pool,
            offer,
            int(solved.counts[p, o]),
            float(capacity[p, o]),
            profiles[offer.gpu].estimated,
            _why(problem, solved, p, o),
        )
        for p, pool in enumerate(pools)
        for o, offer in enumerate(usable)
        if solved.counts[p, o]
    ]
    return Plan(tuple(lines), tuple(pools), solved, rules, catalogue)


def capacities(
    pools: Sequence[PoolDemand], offers: Sequence[Offer], profiles: Mapping[str, Profile], slo_s: float
) -> Floats:
    """float64[P, O] sentences per second of one replica within slo_s; 0 where one sentence alone takes longer."""
    return np.array(
        [
            [
                pool.profile(profiles[offer.gpu]).capacity_per_s(
                    pool.source_tokens, pool.target_tokens, slo_s, pool.arrival_cv2
                )
                for offer in offers
            ]
            for pool in pools
        ]
    )


def _why(problem: FleetProblem, solved: FleetPlan, pool: int, option: int) -> str:
    """What would break with one replica of this option fewer."""
    counts = solved.counts.copy()
    counts[pool, option] -= 1
    broken = problem.pool(pool).violations(counts[pool : pool + 1])
    if any("for a demand" in reason for reason in broken):
        return "peak"
    if any("after losing" in reason for reason in broken):
        return "N+1" if problem.zones == 1 else "zone"
    return "minimum" if broken else "cheapest mix"


def table(plan: Plan) -> str:
    """The plan in words and numbers, for a terminal."""
    header = f"{'pool':<16} {'GPU':<10} {'purchase':<10} {'replicas':>8} {'each/s':>9} {'peak/s':>9} {'USD/h':>9}  set by"
    rows = [
        f"{line.pool.name:<16} {line.offer.gpu + ('*' if line.estimated else ''):<10} {line.offer.purchase:<10}"
        f" {line.replicas:>8}"
        f" {line.capacity_per_s:>9.1f} {line.pool.peak_per_s:>9.1f} {line.usd_per_hour:>9.2f}  {line.why}"
        + (f"  zones {'+'.join(map(str, spread(line.replicas, plan.rules.zones)))}" if plan.rules.zones > 1 else "")
        for line in plan.lines
    ]
    notes = [
        f"p99 within {plan.rules.slo_s:g} s; {plan.rules.degraded_share:.0%} of the peak is still served after losing a "
        + ("replica" if plan.rules.zones == 1 else f"zone of {plan.rules.zones}"),
        f"prices of {plan.catalogue.date}; at most {plan.solved.gap:.2%} above the cheapest possible (proven)",
    ]
    if any(line.estimated for line in plan.lines):
        notes.append("* estimated from bytes and FLOPs, not measured: measure a profile before ordering")
    total = f"total {plan.solved.usd_per_hour:.2f} USD/h"
    return "\n".join([header, *rows, "", total, *notes, "", price_comparison(plan)])


def spread(replicas: int, zones: int) -> list[int]:
    """Replicas per zone, as even as can be, the fuller ones first."""
    return [replicas // zones + (zone < replicas % zones) for zone in range(zones)]


def price_comparison(plan: Plan) -> str:
    """USD per million source characters beside the public services."""
    ours = plan.usd_per_million_chars
    lines = [f"{'USD per million source characters, at the mean load':<52}", f"  {'this plan':<28} {ours:>8.3f}"]
    lines += [
        f"  {price.service:<28} {price.usd_per_million_chars:>8.2f}   ({price.usd_per_million_chars / ours:,.0f}x)"
        for price in plan.catalogue.public
    ]
    lines += [
        f"  {machine.instance} at {machine.usd_per_hour} USD/h costs as much where it translates"
        f" {machine.usd_per_hour / 3600 / ours * 1e6:,.0f} characters/s"
        for machine in plan.catalogue.cpu_machines
    ]
    return "\n".join(lines)


def plot(plan: Plan, path: Path) -> None:
    """USD per hour by pool and option, and USD per million characters beside the public services, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [pool.name for pool in plan.pools]
    options = sorted({(line.offer.gpu, line.offer.purchase) for line in plan.lines})
    figure, (fleet, prices) = plt.subplots(1, 2, figsize=(13, max(3.0, 0.35 * len(names) + 1.5)), width_ratios=(3, 2))
    left = np.zeros(len(names))
    for gpu, purchase in options:
        lines = {line.pool.name: line for line in plan.lines if (line.offer.gpu, line.offer.purchase) == (gpu, purchase)}
        width = np.array([lines[name].usd_per_hour if name in lines else 0.0 for name in names])
        bars = fleet.barh(names, width, left=left, label=f"{gpu} {purchase.replace('_', ' ')}")
        labels = [f"{lines[name].replicas} ({lines[name].why})" if name in lines else "" for name in names]
        fleet.bar_label(bars, labels, label_type="center", fontsize=7)
        left += width
    fleet.set(xlabel="USD per hour; replicas and what sets their number", title=f"{plan.solved.usd_per_hour:.2f} USD/h")
    fleet.invert_yaxis()
    fleet.legend(fontsize=8)
    services = ["this plan", *(price.service for price in plan.catalogue.public)]
    prices.barh(services, [plan.usd_per_million_chars, *(price.usd_per_million_chars for price in plan.catalogue.public)])
    prices.set(xscale="log", xlabel="USD per million source characters, at the mean load")
    prices.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
