"""An event loop whose clock jumps and whose connections stay in the process: no waiting, no noise of the machine.

What is written to a socket pair is at its other end at once. On loopback the kernel's network stack has it in between, on a
busy machine for long enough that the clock would have jumped before it arrived.
"""

from __future__ import annotations

import asyncio
import errno
import selectors
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
ProtocolFactory = Callable[[], asyncio.BaseProtocol]
Address = tuple[str, int]
_TURN_S = 50e-6  # what one turn of the loop with work to do costs on the virtual clock
_FIRST_PORT = 20_000


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping, moves the clock to the next timer as soon as no socket has anything to say."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        events = super().select(0)
        if timeout <= 0:
            self.now_s += _TURN_S
        elif not events:
            self.now_s += timeout
        return events


class _Server:
    """What create_server gives: no socket, only an address at which this loop finds it."""

    def __init__(self, servers: dict[Address, ProtocolFactory], address: Address) -> None:
        self._servers = servers
        self._address = address
        self.sockets = (self,)

    def getsockname(self) -> Address:
        return self._address

    def close(self) -> None:
        self._servers.pop(self._address, None)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """TCP between servers and clients of this loop; whoever connects to anything else is refused."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        self._servers: dict[Address, ProtocolFactory] = {}
        self._wanted: dict[socket.socket, Address] = {}
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def lose(self, seconds: float) -> None:
        """As if the process had not run for so long."""
        self._jumping.now_s += seconds

    async def create_server(self, protocol_factory: ProtocolFactory, host: str, port: int, **_: Any) -> Any:  # type: ignore[override]
        address = host, port or _FIRST_PORT + len(self._servers)
        self._servers[address] = protocol_factory
        return _Server(self._servers, address)

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        if address not in self._servers:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nothing listens on {address} of this loop")
        self._wanted[sock] = address

    async def create_connection(self, protocol_factory: ProtocolFactory, *_: Any, sock: socket.socket, **__: Any) -> Any:  # type: ignore[override]
        served_by = self._servers[self._wanted.pop(sock)]
        sock.close()
        client_end, server_end = socket.socketpair()
        await self.connect_accepted_socket(served_by, server_end)
        return await super().create_connection(protocol_factory, sock=client_end)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
