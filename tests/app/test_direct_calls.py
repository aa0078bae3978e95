"""CallServer, Links and RayPool over real sockets, around the real replica; only Serve's handle is scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from app.call_client import Link, Links, ReplicaGoneError
from app.call_server import CallServer
from app.errors import ServiceError
from app.pools import RayPool
from app.settings import PoolSettings
from app.wire import Busy, CallAddress, Refused, Translated, TranslateReply
from engine.types import TranslationRequest
from tests.app.fakes import FakeTranslator, LocalReplica, Watcher

HOST = "127.0.0.1"


def requests(*texts: str, prefix: str = "r") -> list[TranslationRequest]:
    return [TranslationRequest(f"{prefix}{i}", text, "eng_Latn", "deu_Latn") for i, text in enumerate(texts)]


class Server:
    """One replica that takes direct calls."""

    def __init__(self, name: str, translator: FakeTranslator | None = None) -> None:
        self.name = name
        self.translator = translator or FakeTranslator(max_rows=64, max_waiting=64)
        self.replica: Any = LocalReplica(PoolSettings(), self.translator)
        self.calls: CallServer = self.replica._direct
        self.traces: list[Mapping[str, str]] = []
        self._answer = self.calls.answer
        self.calls.answer = self._remember
        self.answers_serve = True

    async def _remember(self, sentences: list[TranslationRequest], trace: Mapping[str, str]) -> TranslateReply:
        self.traces.append(trace)
        return await self._answer(sentences, trace)

    async def address(self) -> CallAddress:
        return await self.calls.address(self.name, HOST)

    @property
    def num_calls(self) -> int:
        return len(self.traces)

    def hang_up(self) -> None:
        """Break every connection, as when the process is killed."""
        for peer in list(self.calls.peers):
            peer.abort()

    def stop(self) -> None:
        self.translator.gate.set()
        self.replica._thread.stop(drain_s=0.05)
        if self.calls._server is not None:
            self.calls._server.close()
        self.hang_up()


class Handle:
    """Serve's handle: lists the replicas, and takes the calls that find no connection."""

    def __init__(self, *servers: Server) -> None:
        self.servers = list(servers)
        self.num_slow_calls = 0
        self.translate = self

    def broadcast(self, method: str) -> Handle:
        assert method == "call_address"
        return self

    async def results_async(self, *, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if not self.servers:
            raise DeploymentUnavailableError(DeploymentID(name="p"))
        return [await s.address() if s.answers_serve else RuntimeError("unhealthy") for s in self.servers]

    def remote(self, sentences: list[TranslationRequest]) -> asyncio.Future[TranslateReply]:
        self.num_slow_calls += 1
        return asyncio.ensure_future(self.servers[0].replica.translate(sentences))


async def eventually(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 120))  # type: ignore[arg-type]


def held() -> FakeTranslator:
    """Stays in its first step until its gate is set: what is called meanwhile is under way for certain."""
    engine = FakeTranslator(max_rows=64, max_waiting=64)
    engine.gate.clear()
    return engine


LONG = "x " * 20
BUDGET_S = 100.0  # of calls that have to succeed


async def connected(*servers: Server, watcher: Watcher | None = None) -> tuple[RayPool, Handle, Links]:
    """A pool whose links are up."""
    handle = Handle(*servers)
    pool = RayPool("p", handle, direct=True, watcher=watcher)
    links = pool._links
    assert links is not None
    await links.look()
    return pool, handle, links


def test_first_call_takes_serves_way_and_the_next_ones_the_connection() -> None:
    async def scenario() -> None:
        server = Server("a")
        handle = Handle(server)
        pool = RayPool("p", handle, direct=True)
        assert isinstance(await pool.translate(requests("a b"), BUDGET_S), Translated)
        assert (handle.num_slow_calls, server.num_calls) == (1, 0)
        links = pool._links
        assert links is not None
        await eventually(lambda: any(link.takes_calls for link in links._links.values()))
        replies = await asyncio.gather(*(pool.translate(requests("a b", "c", prefix=f"{i}-"), BUDGET_S) for i in range(20)))
        assert [[t.request_id for t in reply.translations] for reply in replies] == [[f"{i}-0", f"{i}-1"] for i in range(20)]
        assert all([t.text for t in reply.translations] == ["A B", "C"] for reply in replies)
        assert (handle.num_slow_calls, server.num_calls) == (1, 20)
        assert server.traces == [{}] * 20  # tracing is off
        server.stop()

    run(scenario)


def test_refusals_and_full_queues_are_answers() -> None:
    async def scenario() -> None:
        server = Server("a", FakeTranslator(max_waiting=1))
        pool, _, _ = await connected(server)
        refused = await pool.translate(requests("a", "w " * 21), BUDGET_S)
        assert isinstance(refused, Refused)
        assert (refused.index, refused.code) == (1, "source_too_long")
        assert await pool.translate(requests("a", "b", "c", prefix="x"), BUDGET_S) == Busy()
        server.stop()

    run(scenario)


def test_calls_go_where_the_fewest_sentences_are_under_way() -> None:
    async def scenario() -> None:
        a, b = Server("a"), Server("b")
        pool, _, _ = await connected(a, b)
        calls = [asyncio.create_task(pool.translate(requests("forever", "forever", "forever", prefix="big"), BUDGET_S))]
        await eventually(lambda: a.num_calls + b.num_calls == 1)
        first, other = (a, b) if a.num_calls else (b, a)
        calls += [asyncio.create_task(pool.translate(requests("forever", prefix=f"{i}-"), BUDGET_S)) for i in range(3)]
        await eventually(lambda: a.num_calls + b.num_calls == 4)
        assert (first.num_calls, other.num_calls) == (1, 3)
        for call in calls:
            call.cancel()
        await eventually(lambda: not first.translator.running and not other.translator.running)
        for server in (a, b):
            server.stop()

    run(scenario)


def test_a_call_whose_connection_breaks_is_made_again_elsewhere() -> None:
    async def scenario() -> None:
        a, b = Server("a", held()), Server("b", held())
        watcher = Watcher()
        pool, _, links = await connected(a, b, watcher=watcher)
        before = dict(links._links)  # a look at Serve's list makes new ones
        call = asyncio.create_task(pool.translate(requests(LONG), BUDGET_S))
        await eventually(lambda: a.translator.is_held or b.translator.is_held)
        first, other = (a, b) if a.num_calls else (b, a)
        other.translator.gate.set()
        first.hang_up()
        reply = await call
        assert isinstance(reply, Translated)
        assert reply.translations[0].text == LONG.upper()
        assert (first.num_calls, other.num_calls, watcher.lost) == (1, 1, [("p", "ReplicaGoneError")])
        assert watcher.ended == [("p", "direct", "lost"), ("p", "direct", "translated")]
        assert (watcher.num_open, watcher.links[0]) == (0, 2)
        assert (before[first.name].is_open, before[other.name].is_open) == (False, True)
        first.translator.gate.set()
        await eventually(lambda: first.translator.cancelled == ["r0"])  # nobody waits there any more
        for server in (a, b):
            server.stop()

    run(scenario)


def test_the_second_loss_is_an_error_with_retry_after() -> None:
    async def scenario() -> None:
        a, b = Server("a", held()), Server("b", held())
        pool, _, _ = await connected(a, b)
        call = asyncio.create_task(pool.translate(requests(LONG), BUDGET_S))
        await eventually(lambda: a.num_calls + b.num_calls == 1)
        first, second = (a, b) if a.num_calls else (b, a)
        first.hang_up()
        await eventually(lambda: second.num_calls == 1)
        second.hang_up()
        with pytest.raises(ServiceError) as error:
            await call
        assert (error.value.code, error.value.retry_after_s) == ("pool_unavailable", 1)
        for server in (a, b):
            server.stop()

    run(scenario)


def test_a_caller_that_goes_away_or_runs_out_of_time_takes_its_work_back() -> None:
    async def scenario() -> None:
        server = Server("a")
        pool, _, links = await connected(server)
        call = asyncio.create_task(pool.translate(requests("forever", "forever"), BUDGET_S))
        await eventually(lambda: len(server.translator.running) == 2)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        await eventually(lambda: not server.translator.running)
        with pytest.raises(ServiceError) as error:
            await pool.translate(requests("forever", prefix="late"), 0.2)
        assert error.value.code == "deadline_exceeded"
        await eventually(lambda: server.replica._thread.num_pending == 0 and not server.translator.has_work)
        # Of all that the engine got: on a busy machine the time may run out before `late0` comes to it.
        assert sorted(server.translator.cancelled) == sorted(server.translator.submitted)
        assert {"r0", "r1"} <= set(server.translator.cancelled)
        (link,) = links._links.values()
        assert (link.num_sentences, link._waiting) == (0, {})
        server.stop()

    run(scenario)


def test_a_replica_that_stops_answers_what_it_has_and_gets_nothing_new() -> None:
    async def scenario() -> None:
        a, b = Server("a", held()), Server("b")
        pool, _, links = await connected(a, b)
        link = links._links["a"]
        old = asyncio.create_task(link.call(requests(LONG), {}))
        await eventually(lambda: a.num_calls == 1)
        a.calls.is_stopping = True  # its "bye" is still on the way
        with pytest.raises(ReplicaGoneError):
            await link.call(requests("x", prefix="racing"), {})
        a.calls.stop_taking_calls()
        await eventually(lambda: not link.takes_calls)
        for i in range(5):
            assert isinstance(await pool.translate(requests("x", prefix=f"{i}-"), BUDGET_S), Translated)
        assert (a.num_calls, b.num_calls) == (1, 5)
        a.translator.gate.set()
        assert isinstance(await old, Translated)
        for server in (a, b):
            server.stop()

    run(scenario)


def test_a_stopping_replica_drains_before_it_closes() -> None:
    async def scenario() -> None:
        server = Server("a", held())
        pool, _, links = await connected(server)
        link = links._links["a"]
        call = asyncio.create_task(pool.translate(requests(LONG), BUDGET_S))
        await eventually(lambda: server.translator.is_held)
        stopping = asyncio.create_task(server.replica.stopped_by_serve())
        await eventually(lambda: server.replica._thread._stopping)
        assert link.is_open
        server.translator.gate.set()
        await stopping
        assert not server.translator.has_work
        assert isinstance(await call, Translated)
        await eventually(lambda: not link.is_open)
        assert server.replica.stopped_by_serve() is None  # once, whoever calls it again

    run(scenario)


def test_links_follow_serves_list() -> None:
    async def scenario() -> None:
        a, b = Server("a"), Server("b")
        _, handle, links = await connected(a)
        handle.servers.append(b)
        await links.look()
        assert {name: link.takes_calls for name, link in links._links.items()} == {"a": True, "b": True}
        a.answers_serve = False  # unhealthy: no new calls, but the connection stays for those under way
        await links.look()
        assert {name: (link.is_open, link.takes_calls) for name, link in links._links.items()} == {
            "a": (True, False),
            "b": (True, True),
        }
        a.answers_serve = True
        await links.look()
        assert links._links["a"].takes_calls
        b.stop()
        await eventually(lambda: not links._links["b"].is_open)
        handle.servers.remove(b)
        await links.look()
        assert set(links._links) == {"a"}
        handle.servers.clear()
        with pytest.raises(DeploymentUnavailableError):
            await links.look()
        links.close()
        with pytest.raises(ReplicaGoneError):
            await Link("secret").call(requests("x"), {})
        a.stop()

    run(scenario)


@pytest.mark.parametrize(
    "sent",
    [
        b'["hello","wrong"]\n',
        b'["hello",7]\n["call",0,{},[]]\n',
        b'["call",0,{},[]]\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 5000,
        b'["hello"]\n',
    ],
)
def test_strangers_are_cut_off_and_disturb_nobody(sent: bytes) -> None:
    async def scenario() -> None:
        server = Server("a")
        pool, _, _ = await connected(server)
        address = await server.address()
        reader, writer = await asyncio.open_connection(HOST, address.port)
        writer.write(sent)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""  # closed without a word
        writer.close()
        assert server.num_calls == 0
        assert isinstance(await pool.translate(requests("x"), BUDGET_S), Translated)
        server.stop()

    run(scenario)


def test_nonsense_after_the_hello_ends_that_connection_only() -> None:
    async def scenario() -> None:
        server = Server("a")
        pool, _, _ = await connected(server)
        address = await server.address()
        for nonsense in ('["call",1,{},[["too","short"]]]', '["call"]', '["call",1,{},[]]', '["dance"]', "7"):
            reader, writer = await asyncio.open_connection(HOST, address.port)
            writer.write(json.dumps(["hello", address.secret]).encode() + b"\n" + nonsense.encode() + b"\n")
            assert await reader.read() == b""
            writer.close()
        assert isinstance(await pool.translate(requests("x"), BUDGET_S), Translated)
        assert len(server.calls.peers) == 1
        server.stop()

    run(scenario)
