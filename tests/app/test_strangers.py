"""Whoever connects to the port for direct calls and does not tell the secret, over real sockets around the real replica."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from app.settings import PoolTuning
from app.wire import Translated, to_line
from tests.app.test_direct_calls import BUDGET_S, HOST, Server, connected, eventually, held, requests, run

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def server(hello_timeout_s: float, max_strangers: int = 64, *, busy: bool = False) -> tuple[Server, list[str]]:
    """A replica, and the reasons for which it closed connections. An ingress that has to get in wants a long time here."""
    replica, reasons = Server("a", held() if busy else None), []
    replica.calls.hello_timeout_s = hello_timeout_s
    replica.calls.max_strangers = max_strangers
    replica.calls.closed = reasons.append
    return replica, reasons


async def stranger(replica: Server) -> Connection:
    return await asyncio.open_connection(HOST, (await replica.address()).port)


async def is_cut_off(connection: Connection) -> bool:
    """Waits for the end of a connection."""
    with suppress(ConnectionResetError):
        assert await connection[0].read() == b""
    connection[1].close()
    return True


def test_a_silent_stranger_is_cut_off_and_an_ingress_is_not() -> None:
    async def scenario() -> None:
        replica, reasons = server(hello_timeout_s=60)
        pool, _, links = await connected(replica)
        replica.calls.hello_timeout_s = 0.2
        assert await is_cut_off(await stranger(replica))
        assert reasons == ["late"]
        await asyncio.sleep(0.3)
        assert links._links["a"].is_open
        assert isinstance(await pool.translate(requests("x"), BUDGET_S), Translated)
        replica.stop()

    run(scenario)


def test_a_hello_that_trickles_in_gains_no_time() -> None:
    async def scenario() -> None:
        replica, reasons = server(hello_timeout_s=0.3)
        connection = await stranger(replica)
        writer = connection[1]

        async def trickle() -> None:
            for byte in to_line("hello", (await replica.address()).secret)[:-1]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        task = asyncio.create_task(trickle())
        assert await is_cut_off(connection)
        assert reasons == ["late"]
        assert not task.done()
        task.cancel()
        replica.stop()

    run(scenario)


def test_a_busy_engine_cuts_strangers_off_too() -> None:
    async def scenario() -> None:
        replica, reasons = server(hello_timeout_s=60, busy=True)
        pool, _, _ = await connected(replica)
        call = asyncio.create_task(pool.translate(requests("forever"), BUDGET_S))
        await eventually(lambda: replica.translator.is_held)
        replica.calls.hello_timeout_s = 0.1
        assert await is_cut_off(await stranger(replica))
        assert replica.translator.is_held
        assert reasons == ["late"]
        call.cancel()
        replica.stop()

    run(scenario)


def test_of_too_many_strangers_the_oldest_go_and_an_ingress_still_gets_in() -> None:
    async def scenario() -> None:
        replica, reasons = server(hello_timeout_s=60, max_strangers=3)
        crowd = [await stranger(replica) for _ in range(5)]
        for connection in crowd[:2]:
            assert await is_cut_off(connection)
        assert reasons == ["crowded", "crowded"]
        pool, _, links = await connected(replica)  # the sixth connection: the third stranger makes room
        assert isinstance(await pool.translate(requests("x"), BUDGET_S), Translated)
        assert await is_cut_off(crowd[2])
        assert links._links["a"].is_open
        assert not any(reader.at_eof() for reader, _ in crowd[3:])
        crowd += [await stranger(replica) for _ in range(2)]  # an ingress counts no more
        await eventually(lambda: len(reasons) == 4)
        assert await is_cut_off(crowd[3])
        for _, writer in crowd[4:]:
            writer.close()
        await eventually(lambda: not replica.calls._strangers)
        assert reasons == ["crowded"] * 4  # they left by themselves
        replica.stop()

    run(scenario)


def test_strangers_leave_one_after_another() -> None:
    """None before its time is up, as the second would be if it went with the first, and none is forgotten."""

    async def scenario() -> None:
        replica, reasons = server(hello_timeout_s=0.3)
        now = asyncio.get_running_loop().time
        closed_at_s: list[float] = []
        replica.calls.closed = lambda reason: (reasons.append(reason), closed_at_s.append(now()))  # type: ignore[assignment]
        came_at_s, crowd = [], []
        for _ in range(2):
            came_at_s.append(now())
            crowd.append(await stranger(replica))
            await asyncio.sleep(0.15)
        for connection in crowd:
            assert await is_cut_off(connection)
        assert reasons == ["late", "late"]
        assert all(closed - came >= 0.3 for came, closed in zip(came_at_s, closed_at_s, strict=True))
        assert await is_cut_off(await stranger(replica))
        replica.stop()

    run(scenario)


def test_a_wrong_secret_is_told_apart_and_user_config_sets_the_limits() -> None:
    async def scenario() -> None:
        replica, reasons = server(hello_timeout_s=60)
        for sent in (to_line("hello", "wrong"), b"GET / HTTP/1.1\r\n\r\n"):
            connection = await stranger(replica)
            connection[1].write(sent)
            assert await is_cut_off(connection)
        assert reasons == ["wrong_secret", "unreadable"]
        await replica.replica.reconfigure({"hello_timeout_s": 0.1, "max_strangers": 7})
        assert (replica.calls.hello_timeout_s, replica.calls.max_strangers) == (0.1, 7)
        assert await is_cut_off(await stranger(replica))
        await replica.replica.reconfigure({})
        assert replica.calls.hello_timeout_s == PoolTuning().hello_timeout_s == 5.0
        replica.stop()

    run(scenario)
