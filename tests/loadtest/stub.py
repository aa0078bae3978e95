"""A translation service of known behaviour; it shares no code with loadtest/."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from aiohttp import web

from tests.loadtest.virtual_time import run_virtually

Delay = Callable[[int], float]  # seconds by number of the request


class StubService:
    """Answers like the service. delay_s(i): of the i-th request; kinds[i]: what to do instead of answering well.

    one_by_one: requests queue for a single server. frozen: (start, end) in seconds since the first request, during which
    nothing is read, worked on or answered.
    """

    def __init__(
        self,
        delay_s: Delay = lambda _: 0.0,
        *,
        kinds: dict[int, str] | None = None,
        one_by_one: bool = False,
        frozen: tuple[float, float] | None = None,
    ) -> None:
        self.bodies: list[dict[str, object]] = []
        self.arrived_s: list[float] = []
        self.answered_s: dict[int, float] = {}  # when the answer to the i-th request was begun
        self._delay_s = delay_s
        self._kinds = kinds or {}
        self._server = asyncio.Lock() if one_by_one else None
        self._frozen = frozen
        self._hanging = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[str]:
        """Base URL while it serves."""
        app = web.Application()
        app.router.add_post("/v1/translate", self._translate)
        app.router.add_get("/readyz", self._ready)
        app.router.add_post("/reset", self._reset)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            host, bound_port = runner.addresses[0][:2]
            yield f"http://{host}:{bound_port}"
        finally:
            self._hanging.set()
            await runner.cleanup()

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _reset(self, request: web.Request) -> web.Response:
        self.bodies.clear()
        self.arrived_s.clear()
        self.answered_s.clear()
        return web.Response()

    async def _translate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        loop = asyncio.get_running_loop()
        number = len(self.arrived_s)
        self.bodies.append(body)
        self.arrived_s.append(loop.time())
        await self._thaw()
        async with self._server or contextlib.nullcontext():
            await asyncio.sleep(self._delay_s(number))
        await self._thaw()
        self.answered_s[number] = loop.time()
        return await self._answer(request, body, self._kinds.get(number, "ok"), self._delay_s(number))

    async def _thaw(self) -> None:
        if self._frozen is not None:
            since_start = asyncio.get_running_loop().time() - self.arrived_s[0]
            if self._frozen[0] <= since_start < self._frozen[1]:
                await asyncio.sleep(self._frozen[1] - since_start)

    async def _answer(self, request: web.Request, body: dict, kind: str, delay_s: float) -> web.StreamResponse:
        translations = [{"text": f"-{text}-"} for text in body["texts"]]
        if kind == "refused":
            return web.json_response({"error": {}}, status=503, headers={"Retry-After": "1"})
        if kind == "hang":
            await self._hanging.wait()
        if kind == "drop":
            request.transport.abort()
        if kind == "short":
            translations.pop()
        if kind == "empty":
            translations[0]["text"] = "  "
        if kind == "html":
            return web.Response(text="<html>hello</html>", content_type="text/html")
        if kind.isdigit():
            return web.json_response({"error": {}}, status=int(kind))
        headers = {"Server-Timing": f"queue;dur=1.0, total;dur={delay_s * 1000:.3f}"}
        return web.json_response({"translations": translations}, headers=headers)


@contextlib.contextmanager
def stub_in_thread(delay_s: Delay) -> Iterator[str]:
    """Base URL of a stub on a loop of its own, in real time."""
    started, stop, urls = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with StubService(delay_s).serving() as url:
            urls.append(url)
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield urls[0]
    finally:
        stop.set()
        thread.join(10)


@contextlib.contextmanager
def stub_in_virtual_time(delay_s: Delay) -> Iterator[str]:
    """Base URL of a stub that serves whatever asyncio.run runs in the block, in virtual time."""

    async def beside_the_stub(main: Coroutine[Any, Any, Any]) -> Any:
        async with StubService(delay_s).serving(8000):
            return await main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "run", lambda main: run_virtually(beside_the_stub(main)))
        yield "http://127.0.0.1:8000"
