"""Where one thread waits for sockets and for other threads at the same time."""

from __future__ import annotations

import collections
import contextlib
import selectors
import socket
from collections.abc import Callable
from typing import Protocol


class Watched(Protocol):
    """A non-blocking socket with its work. Only the poller's own thread calls it."""

    def fileno(self) -> int:
        """Of the socket."""

    def ready(self, mask: int) -> None:
        """It can be read (selectors.EVENT_READ) or written (EVENT_WRITE)."""

    def close(self) -> None:
        """The thread ends: send what is left, if that takes no time, and close the socket."""


class Poller:
    """`poll` belongs to one thread; `run_soon` and `wake` to all."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        for end in (self._waker, self._wakened):
            end.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._actions: collections.deque[Callable[[], None]] = collections.deque()
        self._is_closed = False

    def wake(self) -> None:
        """End the wait of `poll`, or its next one."""
        with contextlib.suppress(OSError):  # many a wake-up is waiting already; or it is closed
            self._waker.send(b"x")

    def run_soon(self, action: Callable[[], None]) -> None:
        """Have the thread run `action` in its next `poll`; never, when it has ended."""
        self._actions.append(action)
        self.wake()

    def watch(self, watched: Watched, *, writing: bool = False) -> None:
        """Wait for `watched` too, also until it can be written. In the poller's thread."""
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        if watched.fileno() in self._selector.get_map():
            self._selector.modify(watched, mask, watched)
        else:
            self._selector.register(watched, mask, watched)

    def forget(self, watched: Watched) -> None:
        """Before its socket is closed. In the poller's thread."""
        self._selector.unregister(watched)

    def poll(self, *, wait: bool) -> None:
        """Serve what is ready; with `wait` until there is something, or a `wake`."""
        for key, mask in self._selector.select(None if wait and not self._actions else 0):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wakened.recv(4096)
            else:
                key.data.ready(mask)
        while self._actions:
            self._actions.popleft()()

    def close(self) -> None:
        """Close everything watched and this. In the poller's thread, as its last act."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.close()
        self._selector.close()
        self._waker.close()
        self._wakened.close()
