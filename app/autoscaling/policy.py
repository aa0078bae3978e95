"""The policy of a live fleet: that of replay, with the capacity of a replica read anew for every decision."""

from __future__ import annotations

from app.autoscaling.feed import Reading
from app.cost.guards import FleetDecision, GuardedPolicy


class LivePolicy(GuardedPolicy):
    """Decides from readings alone, so that a log of them is all it takes to decide again."""

    def decide_on(self, reading: Reading) -> FleetDecision:
        """One decision; capacities of the pools in their order, in requests per second of the policy's clock."""
        self._capacity = reading.capacity
        for members, policy in self._groups:
            policy.sizing.capacity_per_s = reading.capacity[members]
        return self.plan(reading.seen, reading.limits)
