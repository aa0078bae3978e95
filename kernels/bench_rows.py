"""What one benchmark line holds, and the machine it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

_LAUNCH_US = 2.0  # one cold read of S bytes takes about 2.0 us + S / bandwidth (measured on the H200)


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU and its two ceilings, measured in this run."""

    name: str
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. bytes_touched: inputs read once and outputs written once (weights of experts hit only).

    us is 0 when the check failed. anchors_us: other implementations of the same thing in the same run.
    """

    op: str
    case: str
    us: float
    error: float
    limit: float
    bytes_touched: int
    flops: float = 0.0
    launches: int = 1
    anchors_us: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the result was right (NaN is not)."""
        return self.error <= self.limit

    def floor_us(self, machine: Machine) -> float:
        """No version runs much faster than this."""
        return _LAUNCH_US * self.launches + 1e6 * max(
            self.bytes_touched / machine.bytes_per_s, self.flops / machine.flops_per_s
        )
