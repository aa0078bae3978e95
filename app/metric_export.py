"""How numbers reach Ray's exporter: counts as sums a few times a second, levels again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from app.metrics import MetricSpec

_FLUSH_S = 0.25  # Ray's exporter itself reports every 2 s or more
_REPEAT_S = 2.0


class Soon:
    """Runs `action` a little later in a thread of its own, once for all requests until then. Any thread may ask."""

    def __init__(self, action: Callable[[], None], delay_s: float = _FLUSH_S) -> None:
        self._action = action
        self._delay_s = delay_s
        self._is_due = False

    def request(self) -> None:
        """Have it run."""
        if not self._is_due:
            self._is_due = True
            timer = threading.Timer(self._delay_s, self._run)
            timer.daemon = True
            timer.start()

    def _run(self) -> None:
        self._is_due = False  # first: what is asked for while it runs is for the next time
        self._action()


class Counts:
    """Adds increments up and gives Ray the sums now and then: its own increments cost microseconds, several a sentence."""

    def __init__(self, specs: Mapping[str, MetricSpec], live: Mapping[str, Any]) -> None:
        self._specs = specs
        self._live = live
        self._sums: dict[tuple[str, ...], float] = {}  # by metric and values of its labels
        self._lock = threading.Lock()
        self._soon = Soon(self.flush)

    def add(self, metric: str, amount: float, *labels: str) -> None:
        """Count; labels in the order of the spec."""
        place = (metric, *labels)
        with self._lock:
            self._sums[place] = self._sums.get(place, 0) + amount
        self._soon.request()

    def flush(self) -> None:
        """Hand over what has been counted."""
        with self._lock:
            sums, self._sums = self._sums, {}
        for (metric, *labels), amount in sums.items():
            if amount:
                self._live[metric].inc(amount, tags=dict(zip(self._specs[metric].labels, labels, strict=True)))


class Levels:
    """Gauges that are set again by `repeat`: Ray's exporter forgets what nobody has set for two of its reports."""

    def __init__(self, live: Mapping[str, Any]) -> None:
        self._live = live
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # by metric and its labels
        self._due_s = 0.0

    def set(self, metric: str, value: float, tags: Mapping[str, str]) -> None:
        """The level from now on."""
        self._values[metric, tuple(tags.items())] = value
        self._live[metric].set(value, tags=dict(tags))

    def repeat(self) -> None:
        """To be called every few seconds or more often."""
        if (now_s := time.monotonic()) >= self._due_s:
            self._due_s = now_s + _REPEAT_S
            for (metric, tags), value in list(self._values.items()):
                self._live[metric].set(value, tags=dict(tags))
