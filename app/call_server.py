"""A replica's side of direct calls: sockets that the engine thread itself reads and writes, one JSON line a message.

Serve's handle calls cost a replica's process more than a millisecond of Python each, in which its engine thread cannot run.
Serve still starts, checks and stops replicas; only the calls take this way.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from app.engine_thread import EngineDeadError, EngineThread
from app.jobs import Job, Outcome
from app.wire import CallAddress, Failed, TranslateReply, from_line, pack_reply, to_line, unpack_requests
from engine.types import EngineFullError, TranslationRequest

log = logging.getLogger("ray.serve")

_READ_BYTES = 1 << 18
_MAX_HELLO_BYTES = 1024  # of a stranger
_MAX_LINE_BYTES = 64 << 20  # of an ingress: far above max_body_bytes
_MAX_UNSENT_BYTES = 64 << 20  # answers that an ingress does not take: it is not well
_CLOSE_S = 1.0  # for the last answers to leave


class DirectJob(Job):
    """A call. trace: the caller's span as in app.tracing.carrier; started_at_s: epoch seconds."""

    def __init__(self, peer: _Peer, number: int, trace: Mapping[str, str], requests: list[TranslationRequest]) -> None:
        super().__init__(tuple(requests), peer)
        self.number = number
        self.trace = trace
        self.started_at_s = time.time()


class CallServer:
    """Takes calls from every ingress for the engine thread.

    In that thread: offered(job) hears of every call, reply(job, outcome) makes its answer, given_up(job) hears of calls
    whose caller went away.
    """

    def __init__(
        self,
        thread: EngineThread,
        *,
        offered: Callable[[DirectJob], None],
        reply: Callable[[DirectJob, Outcome], TranslateReply],
        given_up: Callable[[DirectJob], None],
    ) -> None:
        self.thread = thread
        self.offered = offered
        self.reply = reply
        self.given_up = given_up
        self.peers: set[_Peer] = set()
        self.is_stopping = False
        self._secret = secrets.token_hex(32)
        self._listener: _Listener | None = None
        self._opening = threading.Lock()

    def address(self, replica_id: str, host: str) -> CallAddress:
        """Where it listens, on one interface; the first call opens the port."""
        with self._opening:
            if self._listener is None:
                self._listener = listener = _Listener(self, socket.create_server((host, 0)))
                self.thread.poller.run_soon(lambda: self.thread.poller.watch(listener))
        return CallAddress(replica_id, host, self._listener.port, self._secret)

    def stop_taking_calls(self) -> None:
        """Tell every ingress to call others from now on; what was accepted goes on. From any thread."""
        self.thread.poller.run_soon(self._say_bye)

    def _say_bye(self) -> None:
        self.is_stopping = True
        for peer in list(self.peers):
            peer.say("bye")
            peer.send()

    def admits(self, secret: object) -> bool:
        """True for the secret that Serve told."""
        return isinstance(secret, str) and hmac.compare_digest(secret.encode(), self._secret.encode())


class _Listener:
    """The socket that waits for connections (app.poller.Watched)."""

    def __init__(self, server: CallServer, listening: socket.socket) -> None:
        listening.setblocking(False)
        self._server = server
        self._socket = listening
        self.port: int = listening.getsockname()[1]

    def fileno(self) -> int:
        return self._socket.fileno()

    def ready(self, mask: int) -> None:
        with contextlib.suppress(OSError):  # it hung up again, or there are too many
            connection, _ = self._socket.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._server.thread.poller.watch(_Peer(self._server, connection))

    def close(self) -> None:
        self._socket.close()


class _Peer:
    """A connection from an ingress (app.poller.Watched), and the outbox of its calls (app.jobs.Outbox)."""

    def __init__(self, server: CallServer, connection: socket.socket) -> None:
        self._server = server
        self._thread = server.thread
        self._socket = connection
        self._is_known = False
        self._is_open = True
        self._is_blocked = False  # the other side is slow to take its answers
        self._rest = b""
        self._unsent = bytearray()
        self._jobs: dict[int, DirectJob] = {}

    def fileno(self) -> int:
        return self._socket.fileno()

    def ready(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_READ:
                self._read()
            if mask & selectors.EVENT_WRITE and self._is_open:
                self.send()
        except OSError:  # the other side is gone
            self._end()
        except Exception as error:  # whoever sends this does not speak our language: its connection ends, nothing else
            log.warning("a direct connection is closed: %s", type(error).__name__)
            self._end()

    def _read(self) -> None:
        data = self._socket.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > (_MAX_LINE_BYTES if self._is_known else _MAX_HELLO_BYTES):
            raise ValueError("a line is too long")
        for line in lines:
            self._receive(*from_line(line))
        self.send()

    def _receive(self, kind: object, *rest: Any) -> None:
        if not self._is_known:
            if kind != "hello" or not self._server.admits(rest[0]):
                raise PermissionError("wrong secret")
            self._is_known = True
            self._server.peers.add(self)
            if self._server.is_stopping:
                self.say("bye")
        elif kind == "call":
            self._start(*rest)
        elif kind == "cancel":
            if (job := self._jobs.pop(rest[0], None)) is not None:
                self._give_up(job)
        else:
            raise ValueError("unknown message")

    def _start(self, number: int, trace: Mapping[str, str], packed: list[Any]) -> None:
        job = DirectJob(self, number, trace, unpack_requests(packed))
        if not job.requests:
            raise ValueError("a call without sentences")
        try:
            if self._server.is_stopping:
                raise EngineDeadError("the replica is stopping")
            self._server.offered(job)
            self._thread.accept(job)
        except EngineFullError as error:
            self.put(job, error)
        except EngineDeadError:
            self.say("gone", number)
        else:
            self._jobs[number] = job

    def _give_up(self, job: DirectJob) -> None:
        self._thread.give_up(job)
        self._server.given_up(job)

    def put(self, job: Job, outcome: Outcome) -> None:
        assert isinstance(job, DirectJob)
        self._jobs.pop(job.number, None)
        reply: TranslateReply
        try:
            reply = self._server.reply(job, outcome)
        except Exception:  # must not end the engine thread
            log.exception("the answer of a direct call could not be made")
            reply = Failed("unexpected error of the replica")
        self.say("answer", job.number, pack_reply(reply))

    def say(self, *message: Any) -> None:
        """One more message for the next `send`."""
        self._unsent += to_line(*message)

    def send(self) -> None:
        """Send what the other side takes now; the rest when it takes more."""
        if not self._is_open or not self._unsent:
            return
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._end()
            return
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self._end()
        elif bool(self._unsent) != self._is_blocked:
            self._is_blocked = bool(self._unsent)
            self._thread.poller.watch(self, writing=self._is_blocked)

    def _end(self) -> None:
        """The connection is over: nobody waits for its calls any more."""
        if not self._is_open:
            return
        self._is_open = False
        self._server.peers.discard(self)
        self._thread.poller.forget(self)
        self._socket.close()
        for job in self._jobs.values():
            self._give_up(job)
        self._jobs.clear()

    def close(self) -> None:
        """The engine thread ends. What is unsent is sent within a second."""
        self._is_open = False
        self._socket.settimeout(_CLOSE_S)
        with contextlib.suppress(OSError):
            self._socket.sendall(self._unsent)
        self._socket.close()
