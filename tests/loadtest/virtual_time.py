"""An event loop whose clock jumps: real sockets, but no waiting and no noise of the machine in what is measured."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_TURN_S = 50e-6  # what one turn of the loop with work to do costs on the virtual clock
_LOOKS = 3  # at the sockets, for bytes still under way on loopback, before the clock jumps


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping, moves the clock to the next timer as soon as no socket has anything to say."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            self.now_s += _TURN_S
            return super().select(0)
        if timeout is None:
            return super().select(None)
        for _ in range(_LOOKS):
            if events := super().select(0):
                return events
            time.sleep(0)
        self.now_s += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def lose(self, seconds: float) -> None:
        """As if the process had not run for so long."""
        self._jumping.now_s += seconds


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
