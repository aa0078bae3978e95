"""Which experts a language pair's decode steps touch, and what a step costs a pool that touches few.

A step reads the weights of every expert that one of its rows is routed to. With p the share of rows that an expert gets,
R rows touch sum (1 - (1 - p)^R) experts of a layer. A pool's experts are told by one number, `experts_used`: that many
experts, used evenly, would be touched as often (mean over layers, over steps of 8, 32 and 128 rows).

    step(R) of a pool = step(R) as measured - x (even(E, R) - even(experts_used, R)),   even(n, R) = n (1 - (1 - k / n)^R)

x, the seconds of one more expert touched in all sparse layers, is fitted to the measured steps: constant + per row + x even.
A profile is measured with rows that use all E experts about evenly. Encoder passes are left as they are: their many tokens
touch most experts whatever the language.

Legend: L sparse decoder layers, E experts, R rows, k experts a row (NLLB-MoE 2, Switch gating 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.cost.profile import Profile, ProfileError, fit_costs, fit_line
from app.cost.traces import Floats

VERSION = 1
EXPERTS_PER_TOKEN = 2  # where a file does not say: NLLB-MoE's
_FEWEST_ROWS = 8  # and 4 and 16 times as many
_MOST_SAVED = 0.9  # of a step: what is left is not less than a tenth of it, whatever was fitted


class ExpertUsageError(ValueError):
    """A measurement that cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """counts by pair float64[L, E]: rows that each expert of each sparse decoder layer got. model, texts: what was measured,
    on what.
    """

    model: str
    num_experts: int
    layers: tuple[int, ...]
    counts: Mapping[str, Floats]
    texts: str = ""
    experts_per_token: int = EXPERTS_PER_TOKEN

    def __post_init__(self) -> None:
        shape = (len(self.layers), self.num_experts)
        if not self.counts or not self.layers or self.num_experts <= self.experts_per_token:
            raise ExpertUsageError(
                f"no pair, no sparse decoder layer or no more than {self.experts_per_token} experts were measured"
            )
        for pair, counts in self.counts.items():
            if counts.shape != shape or not (counts >= 0).all() or not (counts.sum(1) > 0).all():
                raise ExpertUsageError(
                    f"pair {pair}: counts must be {shape[0]} layers of {shape[1]} experts, none of them empty"
                )

    def shares(self, pair: str) -> Floats:
        """float64[L, E], rows add up to k: how much of a layer's rows an expert gets. Of a pair not measured: the mean of
        the pairs with its target language, else of all.
        """
        target = pair.partition("-")[2]
        kin = (
            [pair] if pair in self.counts else [p for p in self.counts if p.partition("-")[2] == target] or list(self.counts)
        )
        shares = [self.counts[p] / self.counts[p].sum(1, keepdims=True) for p in kin]
        return np.asarray(self.experts_per_token * np.mean(shares, axis=0))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        state = {
            "babelephant_experts": VERSION,
            "model": self.model,
            "texts": self.texts,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "layers": self.layers,
            "counts": {pair: counts.astype(int).tolist() for pair, counts in self.counts.items()},
        }
        path.write_text(json.dumps(state) + "\n")

    @classmethod
    def load(cls, path: Path) -> ExpertUsage:
        """Read what `save` wrote. Raises ExpertUsageError, OSError."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            if raw["babelephant_experts"] != VERSION:
                raise ExpertUsageError(f"{path} has version {raw['babelephant_experts']}; this program reads {VERSION}")
            counts = {pair: np.array(rows, np.float64) for pair, rows in raw["counts"].items()}
            experts_per_token = raw.get("experts_per_token", EXPERTS_PER_TOKEN)
            return cls(raw["model"], raw["num_experts"], tuple(raw["layers"]), counts, raw["texts"], experts_per_token)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ExpertUsageError):
                raise
            raise ExpertUsageError(
                f"{path} is no measurement of experts; write one with: babelephant experts --out"
            ) from error


def touched(shares: Floats) -> Floats:
    """float64[3]: experts of a layer touched by steps of 8, 32 and 128 rows, shares float64[L, E], mean over layers."""
    missed = (1.0 - np.minimum(shares, 1.0)) ** _FEWEST_ROWS
    found = []
    for _ in range(3):
        found.append((1.0 - missed).sum(1).mean())
        missed = missed**4
    return np.array(found)


def even(num_experts: float | Floats, rows: float | Floats, experts_per_token: int = EXPERTS_PER_TOKEN) -> Floats:
    """Experts touched by so many rows that use num_experts (k or more) evenly."""
    return np.asarray(num_experts * (1.0 - (1.0 - experts_per_token / np.asarray(num_experts, np.float64)) ** rows))


def experts_used(shares: Floats, experts_per_token: int = EXPERTS_PER_TOKEN) -> float:
    """The even number of experts that is touched as often, see the module docstring; shares float64[L, E]."""
    wanted = float(touched(shares).sum())
    low, high = float(experts_per_token), float(shares.shape[1])
    for _ in range(40):
        middle = 0.5 * (low + high)
        found = sum(middle * (1 - (1 - experts_per_token / middle) ** (_FEWEST_ROWS * times)) for times in (1, 4, 16))
        low, high = (middle, high) if found < wanted else (low, middle)
    return high


def expert_seconds(profile: Profile, num_experts: int, experts_per_token: int = EXPERTS_PER_TOKEN) -> float:
    """x of the module docstring. Raises ProfileError for a profile with fewer than 4 measured steps."""
    if len(profile.step_points) < 4:
        raise ProfileError(
            f"profile of {profile.model} on {profile.device}: steps of {len(profile.step_points)} sizes do not show what an "
            "expert costs; 4 are needed: measure again with more --max-rows"
        )
    rows, seconds = np.array(profile.step_points).T
    touched_evenly = even(num_experts, rows, experts_per_token)
    (_, _, each), _ = fit_costs(np.stack([np.ones_like(rows), rows, touched_evenly], 1), seconds)
    return float(each)


def narrowed(profile: Profile, used: float, num_experts: int, experts_per_token: int = EXPERTS_PER_TOKEN) -> Profile:
    """The profile for a pool that uses `used` of num_experts experts; with all of them the profile itself."""
    if used >= num_experts:
        return profile
    if not used >= experts_per_token:
        raise ProfileError(f"experts_used is {used}; it must be between {experts_per_token} and num_experts {num_experts}")
    rows, seconds = np.array(profile.step_points).T if profile.step_points else (np.zeros(0), np.zeros(0))
    fewer = even(num_experts, rows, experts_per_token) - even(used, rows, experts_per_token)
    saved = expert_seconds(profile, num_experts, experts_per_token) * fewer
    left = np.maximum(seconds - saved, (1 - _MOST_SAVED) * seconds)
    (tau0, alpha, *_), (new_tau0, new_alpha, *_) = fit_line(rows, seconds), fit_line(rows, left)
    return replace(
        profile,
        tau0_s=profile.tau0_s * new_tau0 / tau0 if tau0 else profile.tau0_s,
        alpha_s=profile.alpha_s * new_alpha / alpha if alpha else profile.alpha_s,
        step_points=tuple(zip(rows.tolist(), left.tolist(), strict=True)),
    )
