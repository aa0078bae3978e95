"""What the measured rates cost: price of the replicas over the characters they translated in the same time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadtest.errors import LoadTestError
from loadtest.results import Cost, Rates


@dataclass(frozen=True, slots=True)
class Price:
    """What the replicas behind the service cost."""

    usd_per_replica_hour: float
    num_replicas: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.usd_per_replica_hour) and self.usd_per_replica_hour >= 0) or self.num_replicas < 1:
            raise LoadTestError("the price per replica hour cannot be negative, and there is at least 1 replica")

    def cost(self, rates: Rates) -> Cost:
        """USD per million source characters: price per hour / 3600 / (characters per second) * 1e6."""
        usd_per_s = self.usd_per_replica_hour * self.num_replicas / 3600

        def per_million(chars_per_s: float) -> float | None:
            return usd_per_s / chars_per_s * 1e6 if chars_per_s > 0 else None

        return Cost(
            usd_per_replica_hour=self.usd_per_replica_hour,
            num_replicas=self.num_replicas,
            usd_per_million_good_chars=per_million(rates.good_source_chars_per_s),
            usd_per_million_chars=per_million(rates.source_chars_per_s),
        )
