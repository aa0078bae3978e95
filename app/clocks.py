"""What seconds are told by while the engine is timed."""

from __future__ import annotations

import time


class WallClock:
    """Seconds as they pass."""

    def now(self) -> float:
        """Seconds since some instant."""
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class CpuClock(WallClock):
    """Seconds of CPU time of this process; waiting costs nothing and passes at once. On a machine that others use, this is
    what one thread would take if it had its core to itself (but for the caches).
    """

    def __init__(self) -> None:
        self._waited_s = 0.0

    def now(self) -> float:
        """CPU time, and what was waited."""
        return time.process_time() + self._waited_s

    def wait(self, seconds: float) -> None:
        """Pass over so many seconds."""
        self._waited_s += seconds
