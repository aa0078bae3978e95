"""The HTTP API over fakes: every error in the one shape, with what to mend."""

from __future__ import annotations

import asyncio
import json
import re
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.app.api_calls import GOOD, Make, call, error_of, translate
from tests.app.fakes import LANGUAGES, FakeTranslator


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"texts": []}, "invalid_request", "texts"),
        ({"texts": "one text"}, "invalid_request", "texts"),
        ({"texts": [1]}, "invalid_request", "texts.0"),
        ({"texts": ["a"] * 6}, "invalid_request", "5"),
        ({"texts": None}, "invalid_request", "texts"),
        ({"source_language": "en"}, "invalid_request", "source_language"),
        ({"beam_size": 0}, "invalid_request", "beam_size"),
        ({"beam_size": "4"}, "invalid_request", "beam_size"),
        ({"beam_size": 99}, "invalid_request", "beam_size"),
        ({"beam_size": 1, "num_hypotheses": 2}, "invalid_option", "num_hypotheses"),
        ({"early_stopping": "sometimes"}, "invalid_request", "early_stopping"),
        ({"timeout_s": 0}, "invalid_request", "timeout_s"),
        ({"timeout_s": 31}, "invalid_request", "30"),
        ({"source_lang": "xx"}, "unknown_language", "xx"),
        ({"target_lang": ""}, "unknown_language", "''"),
        ({"target_lang": "en-GB"}, "invalid_request", "eng_Latn"),
        ({"source_lang": "de", "target_lang": "fr"}, "unsupported_pair", "eng_Latn-*"),
        ({"target_lang": "sw"}, "unsupported_language", "swh_Latn"),
        ({"texts": ["ok", "x" * 201]}, "text_too_long", "text 1 has 201 characters; at most 200"),
        ({"texts": ["a\n" * 9]}, "too_many_sentences", "8"),
        ({"texts": ["fine", "fine\n" + "w " * 21]}, "source_too_long", "text 1, line 1"),
    ],
)
def test_unprocessable_requests(make_service: Make, fields: dict[str, Any], code: str, named: str) -> None:
    response = translate(make_service(), **fields)
    assert response.status_code == 422
    error = error_of(response)
    assert error["code"] == code
    assert named in error["message"]


def test_details_help_a_program(make_service: Make) -> None:
    service = make_service()
    assert error_of(translate(service, texts=["a", "w " * 21]))["details"] == {"index": 1, "line": 0, "limit": 512}
    assert error_of(translate(service, texts=["", "y" * 201]))["details"] == {"index": 1, "limit": 200}
    assert error_of(translate(service, target_lang="sw"))["details"]["supported_languages"] == sorted(LANGUAGES)
    pairs = error_of(translate(service, source_lang="fr", target_lang="de"))["details"]["supported_pairs"]
    assert pairs == ["*-eng_Latn", "eng_Latn-*", "eng_Latn-jpn_Jpan"]
    fields = error_of(translate(service, texts=[3], beam_size="x"))["details"]["fields"]
    assert [field["field"] for field in fields] == ["texts.0", "beam_size"]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "url", "content", "headers", "code"),
    [
        ("POST", "/v1/translate", b"{not json", JSON, "invalid_json"),
        ("POST", "/v1/translate", b"", JSON, "invalid_request"),
        ("POST", "/v1/translate", b"[1]", JSON, "invalid_request"),
        ("POST", "/v1/translate", b'{"texts": ["\xff"]}', JSON, "invalid_json"),
        ("POST", "/v1/translate", b"[" * 10_000, JSON, "invalid_json"),
        ("POST", "/v1/translate", b'{"source_lang":"en","target_lang":"de","texts":["\\ud800"]}', JSON, "invalid_request"),
        ("POST", "/v1/translate", b'{"source_lang":"\\udfff","target_lang":"de","texts":["a"]}', JSON, "invalid_request"),
        ("POST", "/v1/translate", b'{"\\udfff": 1}', JSON, "invalid_request"),
        (
            "POST",
            "/v1/translate",
            b'{"source_lang":"en","target_lang":"de","texts":["a"],"length_penalty":NaN}',
            JSON,
            "invalid_request",
        ),
        ("POST", "/v1/translate", json.dumps(GOOD).encode(), {"Content-Type": "text/plain"}, "unsupported_media_type"),
        ("POST", "/v1/translate", json.dumps(GOOD).encode(), {}, "unsupported_media_type"),
        ("POST", "/v1/translate", b"x" * 20_001, JSON, "body_too_large"),
        ("GET", "/v1/translate", b"", {}, "method_not_allowed"),
        ("DELETE", "/livez", b"", {}, "method_not_allowed"),
        ("GET", "/", b"", {}, "not_found"),
        ("GET", "/v1/translate/", b"", {}, "not_found"),
        ("GET", "/../etc/passwd", b"", {}, "not_found"),
        ("GET", "/metrics", b"", {}, "metrics_unavailable"),
    ],
)
def test_everything_else_that_can_go_wrong(
    make_service: Make, method: str, url: str, content: bytes, headers: dict[str, str], code: str
) -> None:
    response = call(make_service(), {"method": method, "url": url, "content": content, "headers": headers})[0]
    assert error_of(response)["code"] == code
    if code == "method_not_allowed":
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"texts": ["caf\xe9"]}', "the body cannot be read: it is not UTF-8"),
        (b"[" * 10_000, "the body cannot be read: it is nested too deep"),
        (b"[1]", "body: must be an object with named fields"),
        (json.dumps({**GOOD, "q": "a"}).encode(), "q: unknown field"),
        (b'{"q": "a"}', "source_lang: missing; target_lang: missing; texts: missing"),
        (
            json.dumps({**GOOD, "texts": ["\ud800"]}).encode(),
            "texts.0: contains half of a surrogate pair, which is not text",
        ),
        (json.dumps({**GOOD, "source_lang": "auto"}).encode(), "none is detected here"),
    ],
)
def test_messages_say_what_to_mend_in_words_of_the_api(make_service: Make, content: bytes, message: str) -> None:
    request = {"method": "POST", "url": "/v1/translate", "content": content, "headers": JSON}
    assert message in error_of(call(make_service(), request)[0])["message"]


@pytest.mark.parametrize("url", ["/v2/translate", "/translate?api-version=3.0", "/language/translate/v2", "/v3/glossaries"])
def test_paths_of_other_services_are_told_where_translations_are(make_service: Make, url: str) -> None:
    error = error_of(call(make_service(), {"method": "POST", "url": url, "json": {"text": ["a"]}})[0])
    assert error["code"] == "not_found"
    assert "POST /v1/translate" in error["message"]


def test_a_wrong_method_is_told_the_right_one(make_service: Make) -> None:
    answers = call(make_service(), *({"method": "PUT", "url": url} for url in ("/v1/translate", "/livez")))
    assert [error_of(answer)["message"].rpartition("; ")[2] for answer in answers] == ["use POST", "use GET"]


def test_a_body_without_length_is_told_the_limit_too(make_service: Make) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"x" * 15_000
        yield b"x" * 15_000

    service = make_service()
    for content in (b"x" * 30_000, chunks()):
        request = {"method": "POST", "url": "/v1/translate", "content": content, "headers": JSON}
        assert error_of(call(service, request)[0])["details"] == {"limit_bytes": 20_000}


@pytest.mark.parametrize("length", [(), ((b"content-length", b"10000000"),)])
def test_large_body_is_thrown_away_as_it_comes_and_an_endless_one_is_given_up(make_service: Make, length: Any) -> None:
    service = make_service()
    answers: list[dict[str, Any]] = []
    num_chunks = 0
    chunk = b"x" * 1_000_000

    async def receive() -> dict[str, Any]:
        nonlocal num_chunks
        num_chunks += 1
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/translate", "raw_path": b"/v1/translate", "query_string": b"",
        "headers": [*length, (b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("service", 80), "client": ("me", 1), "root_path": "",
    }  # fmt: skip
    tracemalloc.start()
    asyncio.run(service.api(scope, receive, send))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answers[0]["status"] == 413
    assert json.loads(answers[1]["body"])["error"]["code"] == "body_too_large"
    assert num_chunks <= 40
    assert peak_bytes < 5_000_000


def test_slow_sender_of_a_large_body_is_answered(make_service: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.middleware._MAX_DISCARD_S", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * 30_000
        await asyncio.sleep(60)
        yield b"x"

    request = {"method": "POST", "url": "/v1/translate", "content": slow(), "headers": JSON}
    assert error_of(call(make_service(), request)[0])["code"] == "body_too_large"


def test_full_pool_answers_busy_with_retry_after(make_service: Make) -> None:
    engine = FakeTranslator(max_rows=1, max_waiting=2)
    service = make_service(main=engine, http={"retry_after_s": 7})
    response = translate(service, texts=["a", "b", "c", "d"])
    assert error_of(response)["code"] == "busy"
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert not engine.has_work
    assert translate(service).status_code == 200


def test_deadline_gives_504_and_frees_the_engine(make_service: Make) -> None:
    engine = FakeTranslator(step_s=0.001)
    response = translate(make_service(main=engine), texts=["forever", "a"], timeout_s=0.2)
    assert error_of(response)["code"] == "deadline_exceeded"
    assert response.status_code == 504
    give_up = time.monotonic() + 60
    while engine.has_work and time.monotonic() < give_up:  # the engine's thread notices between two steps
        time.sleep(0.002)
    assert not engine.has_work


def test_deadline_noticed_by_the_engine_is_504_too(make_service: Make) -> None:
    assert error_of(translate(make_service(), texts=["late"]))["code"] == "deadline_exceeded"


def test_sentence_that_fails_is_500(make_service: Make) -> None:
    assert error_of(translate(make_service(), texts=["fine", "error"]))["code"] == "engine_failed"


def test_engine_that_dies_is_500_and_then_not_ready(make_service: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.replica.exit_soon", lambda: None)  # taken when the replica is made; it would end this process
    service = make_service()
    assert error_of(translate(service, texts=["boom"]))["code"] == "engine_failed"


def test_what_failed_on_our_side_is_one_line_of_the_log_and_what_the_caller_did_is_none(
    make_service: Make, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(main=FakeTranslator(max_rows=1, max_waiting=2, step_s=0.001))
    caplog.clear()  # what loading said
    with caplog.at_level("INFO", logger="ray.serve"):
        for fields in ({"texts": []}, {"source_lang": "xx"}, {"texts": ["a", "b", "c", "d"]}):
            translate(service, **fields)
        assert caplog.records == []
        answers = [translate(service, texts=["error"]), translate(service, texts=["forever"], timeout_s=0.1)]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for line, answer in zip(lines, answers, strict=True):
        error = error_of(answer)
        begins = f"request {error['request_id']}: {answer.status_code} {error['code']} on /v1/translate after "
        assert re.fullmatch(re.escape(begins) + r"\d+\.\d{3} s", line)
    assert not any(record.exc_info for record in caplog.records)


def test_unexpected_exception_is_500_without_leaking(make_service: Make) -> None:
    service = make_service()

    async def broken(*args: Any) -> None:
        raise ZeroDivisionError("secret")

    service.pools["main"].translate = broken  # type: ignore[method-assign]
    error = error_of(translate(service))
    assert error["code"] == "internal"
    assert "secret" not in json.dumps(error)


def test_a_body_that_is_complete_and_too_large_is_refused_without_waiting_for_more(make_service: Make) -> None:
    """Sent in chunks, without a length; the last message is the one that breaks the limit."""
    messages = [{"type": "http.request", "body": b"x" * 15_000, "more_body": more} for more in (True, False)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)  # an error where it is asked for a third

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/translate", "raw_path": b"/v1/translate", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("1.2.3.4", 5), "server": ("service", 80),
    }  # fmt: skip
    asyncio.run(make_service().api(scope, receive, send))
    assert messages == []
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"
