"""Pure ASGI layers around the API: request id, last-resort error answer, metrics; a body limit that never buffers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ServiceError
from app.metric_recorders import IngressMetrics

_MAX_DISCARD_BYTES = 32_000_000
_MAX_DISCARD_S = 10.0

# Answers that somebody will ask about with a request id. What the caller did wrong is the caller's, refusals under overload
# come by the thousand and are counted, and an unexpected error has its line already.
_LOGGED_CODES = ("engine_failed", "deadline_exceeded", "pool_unavailable")

log = logging.getLogger("ray.serve")


def error_response(error: ServiceError, scope: Scope) -> JSONResponse:
    """The one shape of every error answer; leaves the code where the metrics find it."""
    state = scope["state"]
    state["error_code"] = error.code
    return JSONResponse(error.body(state["request_id"]), status_code=error.status, headers=error.headers())


class RequestContext:
    """Outermost layer: keeps or makes the X-Request-ID, answers what nobody caught, records metrics.

    `echo_request_id` False where something in front sends the X-Request-ID back, as Serve does.
    """

    def __init__(self, app: ASGIApp, metrics: IngressMetrics, *, echo_request_id: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP exchange; other ASGI scopes pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = MutableHeaders(scope=scope)
        if not headers.get("x-request-id"):
            headers["x-request-id"] = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = headers["x-request-id"]
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo_request_id:
                    MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: unexpected error", request_id)
            if status:
                raise  # half an answer is out: only breaking the connection tells the client
            error = ServiceError("internal", "unexpected error; quote the request id when reporting it")
            await error_response(error, scope)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds, code = time.perf_counter() - started, state.get("error_code")
            self._metrics.answered(route, status, seconds, code)
            if code in _LOGGED_CODES:
                log.warning("request %s: %s %s on %s after %.3f s", request_id, status, code, route, seconds)


class BodyLimit:
    """Refuses bodies over `max_bytes`, known by Content-Length or by counting, without ever holding them, and bodies that
    have not arrived after `max_s` seconds: a sender that trickles would hold its place for ever.

    The rest of a refused body is read and thrown away, within bounds: a client that is still sending when the connection
    closes sees a reset instead of the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP exchange; other ASGI scopes pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            await _discard_body(receive)
            await error_response(self._error, scope)(scope, receive, send)
            return
        num_bytes = 0
        is_complete = False
        give_up_s = asyncio.get_running_loop().time() + self._max_s

        async def receive_limited() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()  # what comes now is the client hanging up, and that may take long
            try:
                async with asyncio.timeout_at(give_up_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self._max_s:g} s") from None
            is_complete = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                if not is_complete:
                    await _discard_body(receive)
                raise self._error
            return message

        await self._app(scope, receive_limited, send)

    @property
    def _error(self) -> ServiceError:
        message = f"the body is larger than {self._max_bytes} bytes; send fewer texts per request"
        return ServiceError("body_too_large", message, details={"limit_bytes": self._max_bytes})


async def _discard_body(receive: Receive) -> None:
    """Read what is left of a body, at most _MAX_DISCARD_BYTES and for at most _MAX_DISCARD_S."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):  # too slow a sender: it gets its answer now
        async with asyncio.timeout(_MAX_DISCARD_S):
            while num_bytes < _MAX_DISCARD_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class Cors(CORSMiddleware):
    """Starlette's CORS answers, with refusals in this service's error shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer an OPTIONS preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        body = ServiceError("cors_refused", reason).body(request_headers["x-request-id"])
        return JSONResponse(body, status_code=response.status_code)
