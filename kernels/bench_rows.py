"""What a benchmark report holds: its birth certificate, the machine it is compared with, and its lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

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

    us is 0 when the check failed (ValueError otherwise). anchors_us: other implementations of it in the same run.
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

    def __post_init__(self) -> None:
        if self.us and not self.ok:
            raise ValueError(f"{self.op} {self.case}: a time beside a failed check ({self.error:.1e} > {self.limit:.0e})")

    @property
    def ok(self) -> bool:
        """Whether the result was right (NaN is not)."""
        return self.error <= self.limit

    def floor_us(self, machine: Machine) -> float:
        """No version runs much faster than this."""
        return floor_us(machine, self.bytes_touched, self.flops, self.launches)


def floor_us(machine: Machine, bytes_touched: float, flops: float, launches: int) -> float:
    """Launches that must exist, and the slower of reading and computing at this machine's ceilings."""
    return _LAUNCH_US * launches + 1e6 * max(bytes_touched / machine.bytes_per_s, flops / machine.flops_per_s)


def time_if_right(error: float, limit: float, time_us: Callable[[], float]) -> float:
    """`time_us()`, or 0 without a measurement where the check failed: a wrong result has no time."""
    return time_us() if error <= limit else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """One run. certificate: gpu, torch, triton, date, commit, command."""

    certificate: dict[str, str]
    machine: Machine
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """What `read_report` reads; every row with its floor."""
        rows = [{**asdict(row), "floor_us": row.floor_us(self.machine)} for row in self.rows]
        return {"certificate": self.certificate, "machine": asdict(self.machine), "rows": rows}


def read_report(report: Any) -> Report:
    """A report that `kernels.bench --out` wrote; ValueError names what is missing or wrong."""
    try:
        if missing := [part for part in ("certificate", "machine", "rows") if part not in report]:
            raise ValueError(f"{missing} missing")
        if missing := [part for part in ("date", "commit", "torch", "triton") if part not in report["certificate"]]:
            raise ValueError(f"{missing} missing in its certificate")
        rows = [Row(**{name: value for name, value in row.items() if name != "floor_us"}) for row in report["rows"]]
        return Report(report["certificate"], Machine(**report["machine"]), rows)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"not a benchmark report, {error}: write one with kernels.bench --out") from error
