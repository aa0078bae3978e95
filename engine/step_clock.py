"""When the device worked: start and end of every captured pass by its own clock, without a profiler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.step_clock import stamp

LONG_GAP_US = 50.0


@dataclass(frozen=True, slots=True)
class GapReport:
    """Device time between the end of a pass (a decode step or an encoder pass) and the start of the next, in microseconds.

    gapless_share: of gaps of at most 50 us. busy_share: of the time from the first start to the last end.
    """

    num_passes: int
    gapless_share: float
    median_us: float
    p99_us: float
    longest_us: float
    busy_share: float

    @classmethod
    def from_spans(cls, spans: NDArray[np.int64]) -> GapReport:
        """From (start, end) in ns, int64[n, 2], in the order of the stream; n is at least 2."""
        gaps = (spans[1:, 0] - spans[:-1, 1]) / 1e3
        median, p99 = np.percentile(gaps, (50, 99)).tolist()
        return cls(
            num_passes=len(spans),
            gapless_share=float((gaps <= LONG_GAP_US).mean()),
            median_us=median,
            p99_us=p99,
            longest_us=float(gaps.max()),
            busy_share=1.0 - float(gaps.sum() * 1e3 / max(1, spans[-1, 1] - spans[0, 0])),
        )


class StepClock:
    """Keeps the last `capacity` spans. Two small launches a pass (about 3 us each), so it is for measuring only."""

    def __init__(self, device: torch.device, capacity: int = 1 << 16) -> None:
        self._spans = torch.zeros((capacity, 2), dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)

    def start(self) -> None:
        """Work begins here in the current stream."""
        stamp(self._spans, self._count, is_end=False)

    def end(self) -> None:
        """The work that began ends here."""
        stamp(self._spans, self._count, is_end=True)

    def reset(self) -> None:
        """Forget all spans."""
        self._count.zero_()

    def spans(self) -> NDArray[np.int64]:
        """int64[n, 2]: start and end in ns of the last spans, oldest first; waits for the device."""
        number, capacity = int(self._count), len(self._spans)
        kept = min(number, capacity)
        places = torch.arange(number - kept, number) % capacity
        return self._spans.cpu()[places].numpy()

    def gaps(self) -> GapReport | None:
        """None while there are fewer than two spans."""
        spans = self.spans()
        return GapReport.from_spans(spans) if len(spans) > 1 else None
