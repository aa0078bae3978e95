"""A replica's side of direct calls: connections from every ingress in the replica's event loop, one JSON line a message.

Serve's handle calls cost a replica's process more than a millisecond of Python each, in which its engine thread cannot run.
Serve still starts, checks and stops replicas; only the calls take this way.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from app.engine_thread import EngineDeadError
from app.settings import PoolTuning
from app.wire import (
    CallAddress,
    Failed,
    TranslateReply,
    from_line,
    notice_dead_machines,
    pack_reply,
    to_line,
    unpack_requests,
)
from engine.types import TranslationRequest

log = logging.getLogger("ray.serve")

_MAX_HELLO_BYTES = 1024  # of a stranger
_MAX_LINE_BYTES = 64 << 20  # of an ingress: far above max_body_bytes
_MAX_UNSENT_BYTES = 64 << 20  # answers that an ingress does not take: it is not well
_CLOSE_S = 1.0  # for the last answers to leave

Answer = Callable[[list[TranslationRequest], Mapping[str, str]], Awaitable[TranslateReply]]


class CallServer:
    """Takes calls from every ingress; all of it in one event loop.

    answer(sentences, the caller's span as in app.tracing.carrier) answers a call; it raises EngineDeadError for one that was
    not started, and is cancelled when the caller goes away. closed(reason) hears of connections that this side ends: `late`
    (no secret within hello_timeout_s), `crowded` (the oldest of more than max_strangers that have not told it),
    `wrong_secret`, `unreadable`.
    """

    def __init__(self, answer: Answer, *, closed: Callable[[str], None] = lambda reason: None) -> None:
        self.answer = answer
        self.closed = closed
        self.hello_timeout_s = PoolTuning().hello_timeout_s
        self.max_strangers = PoolTuning().max_strangers
        self.num_open = 0  # calls that are not answered yet
        self.peers: set[_Peer] = set()
        self.is_stopping = False
        self._strangers: dict[_Peer, float] = {}  # that have not told the secret, oldest first -> when they came
        self._next_look_s = math.inf  # at the strangers
        self._secret = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()

    async def address(self, replica_id: str, host: str) -> CallAddress:
        """Where it listens, on one interface; the first call opens the port, in the loop that all calls will use."""
        async with self._opening:
            if self._server is None:
                self._loop = asyncio.get_running_loop()
                self._server = await self._loop.create_server(lambda: _Peer(self, self._loop), host, 0)
        return CallAddress(replica_id, host, self._server.sockets[0].getsockname()[1], self._secret)

    def stop_taking_calls(self) -> None:
        """Tell every ingress to call others from now on; what was accepted goes on."""
        self.is_stopping = True
        for peer in self.peers:
            peer.say("bye")

    async def close(self) -> None:
        """After the last answer: no more connections; what is unsent is sent within a second."""
        if self._server is not None:
            self._server.close()
        for peer in (*self.peers, *self._strangers):
            peer.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                while self.peers or self._strangers:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            for peer in (*self.peers, *self._strangers):
                peer.abort()

    def meet(self, peer: _Peer) -> None:
        """Somebody connected."""
        self._strangers[peer] = now_s = self._loop.time()
        if len(self._strangers) > self.max_strangers:
            next(iter(self._strangers)).close_for("crowded")  # an ingress tells its secret at once
        self._look_again_at(now_s + self.hello_timeout_s)

    def know(self, peer: _Peer) -> None:
        """It told the secret."""
        del self._strangers[peer]
        self.peers.add(peer)

    def forget(self, peer: _Peer) -> None:
        """Its connection is over."""
        self._strangers.pop(peer, None)
        self.peers.discard(peer)

    def _look_again_at(self, moment_s: float) -> None:
        if moment_s < self._next_look_s:
            self._next_look_s = moment_s
            self._loop.call_at(moment_s, self._close_late_ones)

    def _close_late_ones(self) -> None:
        self._next_look_s = math.inf
        while self._strangers:
            peer, came_at_s = next(iter(self._strangers.items()))
            if (moment_s := came_at_s + self.hello_timeout_s) > self._loop.time():
                return self._look_again_at(moment_s)
            peer.close_for("late")
        return None

    def admits(self, secret: object) -> bool:
        """True for the secret that Serve told."""
        return isinstance(secret, str) and hmac.compare_digest(secret.encode(), self._secret.encode())


class _Peer(asyncio.Protocol):
    """A connection, from an ingress once it has told the secret."""

    def __init__(self, server: CallServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._transport: asyncio.Transport
        self._is_known = False
        self._rest = b""
        self._unsent: list[bytes] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}  # calls, by number

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own
        notice_dead_machines(transport.get_extra_info("socket"))
        self._server.meet(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody waits for its calls any more."""
        self._server.forget(self)
        for task in self._tasks.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        """Calls, or whatever a stranger sends: nothing it can say ends more than its connection."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            if len(self._rest) > (_MAX_LINE_BYTES if self._is_known else _MAX_HELLO_BYTES):
                raise ValueError("a line is too long")
            for line in lines:
                self._receive(*from_line(line))
        except PermissionError:
            self.close_for("wrong_secret")
        except Exception as error:
            log.warning("a direct connection is closed: %s", type(error).__name__)
            self.close_for("unreadable")

    def close_for(self, reason: str) -> None:
        """End a connection that is not an ingress's, or not a sane one's."""
        self._server.closed(reason)
        self._server.forget(self)
        self.abort()

    def abort(self) -> None:
        """End it at once."""
        self._transport.abort()

    def close(self) -> None:
        """End it when all is sent."""
        self._flush()
        self._transport.close()

    def _receive(self, kind: object, *rest: Any) -> None:
        if not self._is_known:
            if kind != "hello" or not self._server.admits(rest[0]):
                raise PermissionError("wrong secret")
            self._is_known = True
            self._server.know(self)
            if self._server.is_stopping:
                self.say("bye")
        elif kind == "call":
            self._start(*rest)
        elif kind == "cancel":
            if (task := self._tasks.get(rest[0])) is not None:
                task.cancel()
        else:
            raise ValueError("unknown message")

    def _start(self, number: int, trace: Mapping[str, str], packed: list[Any]) -> None:
        requests = unpack_requests(packed)
        if not requests:
            raise ValueError("a call without sentences")
        if self._server.is_stopping:
            self.say("gone", number)
            return
        self._server.num_open += 1
        self._tasks[number] = task = self._loop.create_task(self._answer(number, requests, trace))
        task.add_done_callback(lambda _: self._end(number))

    def _end(self, number: int) -> None:
        del self._tasks[number]
        self._server.num_open -= 1

    async def _answer(self, number: int, requests: list[TranslationRequest], trace: Mapping[str, str]) -> None:
        try:
            self.say("answer", number, pack_reply(await self._server.answer(requests, trace)))
        except EngineDeadError:
            self.say("gone", number)
        except Exception:
            log.exception("the answer of a direct call could not be made")
            self.say("answer", number, pack_reply(Failed("unexpected error of the replica")))

    def say(self, *message: Any) -> None:
        """Send one more message; those of one turn of the event loop leave together."""
        self._unsent.append(to_line(*message))
        if len(self._unsent) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and not self._transport.is_closing():
            self._transport.write(b"".join(unsent))
            if self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
                self.abort()
