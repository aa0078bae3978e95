"""An ingress's side of direct calls: one connection to every replica of a pool, kept up with those that Serve lists."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from ray.serve.exceptions import RayServeException

from app.wire import CallAddress, TranslateReply, from_line, notice_dead_machines, pack_requests, to_line, unpack_reply
from engine.types import TranslationRequest

log = logging.getLogger("ray.serve")

_LOOK_AGAIN_S = 1.0  # how long a new replica goes without direct calls
_LIST_S = 5.0
_CONNECT_S = 3.0


class ReplicaGoneError(ConnectionError):
    """The connection broke with the call on it, or the replica is stopping and did not start it."""


class Link(asyncio.Protocol):
    """One connection to a replica. `num_sentences`: asked for on it and not answered yet."""

    def __init__(self, secret: str) -> None:
        self.num_sentences = 0
        self.is_listed = True  # by Serve, at the last look
        self._secret = secret
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._said_bye = False
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[Sequence[TranslationRequest], asyncio.Future[TranslateReply]]] = {}
        self._rest = b""
        self._unsent: list[bytes] = []

    @property
    def is_open(self) -> bool:
        """False once the connection is closed."""
        return self._transport is not None

    @property
    def takes_calls(self) -> bool:
        """False while the replica should get no new ones."""
        return self.is_open and self.is_listed and not self._said_bye

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce ourselves."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own
        notice_dead_machines(transport.get_extra_info("socket"))
        self._send("hello", self._secret)

    def connection_lost(self, error: Exception | None) -> None:
        """Whoever waits for an answer gets ReplicaGoneError."""
        self._transport = None
        for _, answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ReplicaGoneError("the connection to the replica broke"))

    async def call(self, requests: Sequence[TranslationRequest], trace: Mapping[str, str]) -> TranslateReply:
        """Translate on this replica; a caller that is cancelled takes its work back. Raises ReplicaGoneError."""
        if not self.is_open:
            raise ReplicaGoneError("the connection to the replica is closed")
        number = next(self._numbers)
        answer: asyncio.Future[TranslateReply] = self._loop.create_future()
        self._waiting[number] = (requests, answer)
        self.num_sentences += len(requests)
        self._send("call", number, trace, pack_requests(requests))
        try:
            return await answer
        except asyncio.CancelledError:
            self._send("cancel", number)
            raise
        finally:
            del self._waiting[number]
            self.num_sentences -= len(requests)

    def data_received(self, data: bytes) -> None:
        """Give answers to their callers."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            for line in lines:
                self._receive(*from_line(line))
        except Exception as error:
            log.warning("a replica's answer cannot be read, its connection is closed: %r", error)
            self.close()

    def _receive(self, kind: object, *rest: Any) -> None:
        if kind == "bye":
            self._said_bye = True
            return
        requests, answer = self._waiting.get(rest[0], ((), None))
        if answer is None or answer.done():  # its caller went away
            return
        if kind == "answer":
            answer.set_result(unpack_reply(rest[1], requests))
        elif kind == "gone":
            answer.set_exception(ReplicaGoneError("the replica is stopping"))
        else:
            raise ValueError("unknown message")

    def _send(self, *message: Any) -> None:
        """Queue one message; those of one turn of the event loop leave together."""
        if self._transport is None:
            return
        self._unsent.append(to_line(*message))
        if len(self._unsent) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None:
            self._transport.write(b"".join(unsent))

    def close(self) -> None:
        """Close at once; whoever waits gets ReplicaGoneError."""
        if self._transport is not None:
            self._transport.abort()


class Links:
    """Connections to the replicas of one pool. `handle`: Serve's, which knows them.

    on_look(number of replicas that take calls) is called after every look at Serve's list.
    """

    def __init__(self, pool: str, handle: Any, on_look: Callable[[int], None] = lambda num_open: None) -> None:
        self._pool = pool
        self._handle = handle
        self._on_look = on_look
        self._links: dict[str, Link] = {}  # by replica id
        self._wanted = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    def least_loaded(self) -> Link | None:
        """The link with the fewest sentences under way from here; None while there is none to call on.

        Has Serve's list looked at again soon: a pool that nobody calls is left alone, it may be asleep.
        """
        self._wanted.set()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._keep_up())
        links = [link for link in self._links.values() if link.takes_calls]
        return min(links, key=lambda link: (link.num_sentences, random.random()), default=None)

    async def _keep_up(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self.look()
            except (TimeoutError, RayServeException):
                pass  # no replica, or one that hangs: calls take Serve's way, which waits for one and starts one
            except Exception:
                log.exception("pool %s: its replicas could not be listed", self._pool)
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def look(self) -> None:
        """Ask Serve's replicas for their addresses; connect to new ones, give no new calls to those that did not answer."""
        try:
            await self._look()
        finally:
            self._on_look(sum(link.takes_calls for link in self._links.values()))

    async def _look(self) -> None:
        replies = await asyncio.wait_for(
            self._handle.broadcast("call_address").results_async(return_exceptions=True), _LIST_S
        )
        listed = {reply.replica_id: reply for reply in replies if isinstance(reply, CallAddress)}
        self._links = {replica_id: link for replica_id, link in self._links.items() if link.is_open}
        for replica_id, link in self._links.items():
            link.is_listed = replica_id in listed
        await asyncio.gather(*(self._connect(listed[new]) for new in listed.keys() - self._links.keys()))

    async def _connect(self, address: CallAddress) -> None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                loop = asyncio.get_running_loop()
                _, link = await loop.create_connection(lambda: Link(address.secret), address.host, address.port)
        except OSError as error:  # a timeout too
            log.warning("pool %s: no direct connection to %s: %s", self._pool, address.replica_id, type(error).__name__)
        else:
            self._links[address.replica_id] = link

    def close(self) -> None:
        """Close every connection and stop looking."""
        if self._watch is not None:
            self._watch.cancel()
        for link in self._links.values():
            link.close()
