"""Nonsense in every part of an HTTP request, straight into the real ASGI app: one answer each, of the known shape.

Raw ASGI, because client libraries refuse to send most of this; a server in front lets more of it through than one thinks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import ERRORS
from app.ingress import build_api
from app.metric_recorders import IngressMetrics
from app.prometheus import MetricsRelay
from app.settings import ServiceSettings
from tests.app.conftest import SETTINGS, Service
from tests.app.fakes import FakeTranslator

ROUTES = ("/v1/translate", "/v1/languages", "/v1/status", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs")
GOOD = {"source_lang": "en", "target_lang": "de", "texts": ["a b"]}
EXPECTED_5XX = {503}  # /metrics without an exporter


class RecordingMetrics(IngressMetrics):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def answered(self, route: str, status: int, seconds: float, error_code: str | None) -> None:
        self.seen.append((route, status))


class Fuzzed:
    """The app, and what it did with one raw request."""

    def __init__(self, service: Service) -> None:
        self.metrics = RecordingMetrics()
        self.api = build_api(service.translation, self.metrics, MetricsRelay(list), echo_request_id=True)

    def send(
        self,
        method: str = "POST",
        path: str = "/v1/translate",
        *,
        raw_path: bytes | None = None,
        query: bytes = b"",
        headers: list[tuple[bytes, bytes]] | None = None,
        body: tuple[bytes, ...] = (b"",),
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        chunks = list(body)
        messages = [
            {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)
        ]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surrogateescape") if raw_path is None else raw_path,
            "query_string": query,
            "root_path": "",
            "headers": headers or [],
            "client": ("1.2.3.4", 5),
            "server": ("service", 80),
        }
        asyncio.run(asyncio.wait_for(self.api(scope, receive, send), 120))
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) == 1
        answer = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        return starts[0]["status"], dict(starts[0]["headers"]), answer


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    settings_ = ServiceSettings.model_validate(SETTINGS)
    service = Service(settings_, {name: FakeTranslator(max_waiting=64) for name in settings_.pools})  # what was given up too
    yield Fuzzed(service)
    service.stop()


def check(
    fuzzed: Fuzzed, answer: tuple[int, dict[bytes, bytes], bytes], *, allowed_5xx: frozenset[int] = frozenset()
) -> None:
    """A status below 500, JSON in the one error shape, no line break in a header, a label of the metrics that exists."""
    status, headers, body = answer
    assert status < 500 or status in allowed_5xx, body
    assert not any(b"\r" in part or b"\n" in part for item in headers.items() for part in item)
    if status >= 400 and headers.get(b"content-type", b"").startswith(b"application/json") and body:
        error = json.loads(body)["error"]
        assert ERRORS[error["code"]][0] == status
        assert error["request_id"]
    route, recorded = fuzzed.metrics.seen[-1]
    assert recorded == status
    assert route in (*ROUTES, "unmatched", "/docs-files", "/docs/oauth2-redirect")


token = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=':"(),/;<=>?@[]{}\\'), min_size=1)
header_value = st.binary(max_size=60).filter(lambda value: not set(value) & {0, 10, 13})
headers = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from([b"content-type", b"content-length", b"x-request-id", b"accept", b"origin", b"expect", b"host"]),
            token.map(lambda name: name.lower().encode()),
        ),
        st.one_of(
            header_value, st.sampled_from([b"application/json", b"-1", b"1e9", b"9" * 400, b"application/json; charset=x"])
        ),
    ),
    max_size=8,
)


@settings(max_examples=150)
@given(headers=headers, body=st.one_of(st.just(json.dumps(GOOD).encode()), st.binary(max_size=200)))
def test_any_headers(fuzzed: Fuzzed, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    check(fuzzed, fuzzed.send(headers=headers, body=(body[:7], body[7:])))


paths = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(lambda path: "/" + path),
    st.tuples(
        st.sampled_from(ROUTES), st.sampled_from(["/", "//", "/..", "/%2e%2e", "\x00", "?", "#", " ", "%00", "/v1"])
    ).map("".join),
    st.sampled_from(ROUTES),
)
methods = st.one_of(st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "TRACE", "CONNECT"]), token)


@settings(max_examples=200)
@given(method=methods, path=paths, query=st.binary(max_size=40), headers=headers)
def test_any_path_and_method(
    fuzzed: Fuzzed, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    check(fuzzed, fuzzed.send(method, path, query=query, headers=headers), allowed_5xx=frozenset(EXPECTED_5XX))


@pytest.mark.parametrize(
    "path",
    [
        "/docs-files/../../../../../../etc/passwd",
        "/docs-files/..%2f..%2f..%2fetc/passwd",
        "/docs-files//etc/passwd",
        "/docs-files/\x00",
        "/docs-files/....//....//etc/passwd",
        "/docs-files/" + "a" * 5000,
    ],
)
def test_the_files_of_the_documentation_page_are_all_there_is(fuzzed: Fuzzed, path: str) -> None:
    status, _, body = fuzzed.send("GET", path)
    assert status == 404
    assert b"root:" not in body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "source_lang", "target_lang", "texts", "beam_size", "length_penalty", "timeout_s", "num_hypotheses", "early_stopping",
    "max_target_tokens", "no_repeat_ngram_size", "surprise",
)  # fmt: skip


@settings(max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4), drop=st.sets(st.sampled_from(FIELDS[:3])))
def test_any_json_body(fuzzed: Fuzzed, changes: dict[str, Any], drop: set[str]) -> None:
    body = {key: value for key, value in {**GOOD, **changes}.items() if key not in drop or key in changes}
    answer = fuzzed.send(headers=[(b"content-type", b"application/json")], body=(json.dumps(body).encode(),))
    check(fuzzed, answer, allowed_5xx=frozenset({504}))  # a time budget of next to nothing runs out


@pytest.mark.parametrize("opening", [b"[", b'{"texts":', b'{"a":'])
def test_deep_nesting_is_refused(fuzzed: Fuzzed, opening: bytes) -> None:
    status, _, body = fuzzed.send(headers=[(b"content-type", b"application/json")], body=(opening * 3000,))
    assert status in (400, 413, 422)
    assert json.loads(body)["error"]["code"] in ("invalid_json", "body_too_large", "invalid_request")


def test_a_body_that_trickles_is_given_up(make_service: Callable[..., Service]) -> None:
    service = make_service(http={"max_body_s": 0.1})

    async def scenario() -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.03)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/translate", "raw_path": b"/v1/translate", "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "client": ("1.2.3.4", 5), "server": ("service", 80),
        }  # fmt: skip
        await service.api(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]

    status, body = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert (status, json.loads(body)["error"]["code"]) == (408, "body_too_slow")


def test_a_body_in_time_does_not_shorten_the_work(make_service: Callable[..., Service]) -> None:
    """The limit ends with the body: a translation may take longer than it."""
    service = make_service(main=FakeTranslator(step_s=0.1), http={"max_body_s": 0.2})

    async def scenario() -> int:
        async with service.client() as client:
            response = await client.post("/v1/translate", json={**GOOD, "texts": ["a b c d e"]})
            return response.status_code

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == 200
