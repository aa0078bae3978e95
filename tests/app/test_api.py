"""The HTTP API over fakes: what is answered, and by whom."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest

from tests.app.api_calls import GOOD, Make, call, error_of, translate


def test_translations_in_order_with_counts_timings_and_headers(make_service: Make) -> None:
    service = make_service()
    response = translate(service, texts=["one two three", "", "  \n ", "four", "a b\n\n  c\r\n"], source_lang="EN_us")
    assert response.status_code == 200
    body = response.json()
    assert [t["text"] for t in body["translations"]] == ["ONE TWO THREE", "", "", "FOUR", "A B\n\n  C\r\n"]
    assert (body["source_lang"], body["target_lang"], body["pool"]) == ("eng_Latn", "deu_Latn", "main")
    assert body["request_id"] == response.headers["x-request-id"]
    first, empty, _, _, lines = body["translations"]
    assert (first["source_tokens"], first["target_tokens"], first["finish_reason"]) == (5, 5, "eos")
    assert first["timings"] == {"queue_ms": 3.0, "encode_ms": 2.0, "decode_ms": 3.0}
    assert (empty["score"], empty["finish_reason"], empty["target_tokens"]) == (None, "empty", 0)
    assert (lines["source_tokens"], lines["timings"]["queue_ms"]) == (4 + 3, 2.0)  # sum of tokens, slowest line
    assert "hypotheses" not in first
    timing = dict(part.strip().split(";dur=") for part in response.headers["server-timing"].split(","))
    assert set(timing) == {"queue", "encode", "decode", "total"}
    assert float(timing["queue"]) == 3.0


def test_one_pool_call_carries_all_sentences_and_blank_ones_never_leave(make_service: Make) -> None:
    service = make_service()
    translate(service, texts=["a\nb", "", "c"], beam_size=2, length_penalty=0.5, early_stopping="never", max_target_tokens=9)
    (sent,) = service.pools["main"].calls
    assert [request.source_text for request in sent] == ["a", "b", "c"]
    assert len({request.request_id for request in sent}) == 3
    search = sent[0].search
    assert (search.beam_size, search.length_penalty, search.early_stopping, search.max_target_tokens) == (2, 0.5, "never", 9)
    assert sent[0].time_budget_s == 20
    assert translate(service, texts=["", " "]).json()["translations"][1]["text"] == ""
    assert len(service.pools["main"].calls) == 1


def test_default_beam_size_is_the_services(make_service: Make) -> None:
    service = make_service()
    translate(service, timeout_s=2.5)
    assert service.pools["main"].calls[0][0].search.beam_size == 3
    assert service.pools["main"].calls[0][0].time_budget_s == 2.5


def test_pair_decides_the_pool(make_service: Make) -> None:
    service = make_service()
    assert translate(service, target_lang="ja").json()["pool"] == "asia"
    assert translate(service, target_lang="fr").json()["pool"] == "main"
    assert [len(service.pools[name].calls) for name in ("asia", "main")] == [1, 1]


def test_hypotheses_join_line_by_line_and_average_by_tokens(make_service: Make) -> None:
    body = translate(make_service(), texts=["a b\nc"], num_hypotheses=2, beam_size=3).json()["translations"][0]
    assert [h["text"] for h in body["hypotheses"]] == ["A B\nC", "A B!\nC!"]
    assert body["hypotheses"][1]["score"] == pytest.approx(-1.5)
    assert body["text"] == body["hypotheses"][0]["text"]


def test_cut_line_shows_in_finish_reason(make_service: Make) -> None:
    assert translate(make_service(), texts=["a\ncut"]).json()["translations"][0]["finish_reason"] == "length"


def test_request_id_of_the_client_is_kept_and_may_be_reused(make_service: Make) -> None:
    service = make_service()
    headers = {"X-Request-ID": "mine 42"}
    request = {"method": "POST", "url": "/v1/translate", "json": GOOD, "headers": headers}

    async def scenario() -> list[httpx.Response]:
        async with service.client() as client:
            return await asyncio.gather(*(client.request(**request) for _ in range(3)))

    for response in asyncio.run(scenario()):
        assert response.headers["x-request-id"] == response.json()["request_id"] == "mine 42"
    failed = call(service, {"method": "GET", "url": "/nope", "headers": headers})[0]
    assert error_of(failed)["request_id"] == "mine 42"


def test_probes_may_use_head(make_service: Make) -> None:
    for answer in call(make_service(), *({"method": "HEAD", "url": url} for url in ("/livez", "/readyz"))):
        assert answer.status_code == 200


def test_json_subtypes_and_charset_are_fine(make_service: Make) -> None:
    for media_type in ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"):
        headers = {"Content-Type": media_type}
        request = {"method": "POST", "url": "/v1/translate", "content": json.dumps(GOOD), "headers": headers}
        assert call(make_service(), request)[0].status_code == 200


def test_languages(make_service: Make) -> None:
    body = call(make_service(), {"method": "GET", "url": "/v1/languages"})[0].json()
    assert [language["code"] for language in body["languages"]] == ["en", "fr", "de", "ja"]  # by English name
    assert body["languages"][2] == {"code": "de", "flores": "deu_Latn", "name": "German"}
    assert [(pool["name"], pool["pairs"]) for pool in body["pools"]] == [("main", ["en-*", "*-en"]), ("asia", ["en-ja"])]


def test_health_status_and_docs(make_service: Make) -> None:
    service = make_service()
    gets = [{"method": "GET", "url": url} for url in ("/livez", "/readyz", "/v1/status", "/docs", "/openapi.json")]
    livez, readyz, status, docs, openapi = call(service, *gets)
    assert livez.json() == readyz.json() == {"status": "ok"}
    replica = status.json()["pools"][1]["replicas"][0]
    assert (replica["replica_id"], replica["max_rows"], replica["num_running"]) == ("local", 4, 0)
    assert "swagger" in docs.text.lower()
    assert set(openapi.json()["paths"]) == {
        "/v1/translate", "/v1/languages", "/v1/status", "/livez", "/readyz", "/metrics",
    }  # fmt: skip


def test_not_ready_while_a_pool_does_not_answer(make_service: Make) -> None:
    service = make_service()
    service.pools["asia"].replica._thread.stop(drain_s=1)

    async def unavailable() -> None:
        from app.errors import ServiceError

        raise ServiceError("pool_unavailable", "pool asia does not answer")

    service.pools["asia"].status = unavailable  # type: ignore[assignment,method-assign]
    livez, readyz = call(service, {"method": "GET", "url": "/livez"}, {"method": "GET", "url": "/readyz"})
    assert livez.status_code == 200
    assert error_of(readyz)["code"] == "not_ready"
    assert "asia" in readyz.json()["error"]["message"]


def test_cors_is_off_unless_configured(make_service: Make) -> None:
    preflight = {
        "method": "OPTIONS",
        "url": "/v1/translate",
        "headers": {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"},
    }
    assert error_of(call(make_service(), preflight)[0])["code"] == "method_not_allowed"
    service = make_service(http={"cors_allow_origins": ["https://a.example"]})
    allowed = call(service, preflight)[0]
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = {**preflight, "headers": {**preflight["headers"], "Origin": "https://b.example"}}
    assert error_of(call(service, other)[0])["code"] == "cors_refused"


def test_the_documentation_page_needs_no_other_host(make_service: Make) -> None:
    service = make_service()
    page = call(service, {"method": "GET", "url": "/docs"})[0].text
    assets = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)
    assert any(asset.endswith(".js") for asset in assets)
    assert any(asset.endswith(".css") for asset in assets)
    assert not [asset for asset in assets if "//" in asset]
    for answer in call(service, *({"method": "GET", "url": asset} for asset in assets)):
        assert answer.status_code == 200
    missing = call(service, {"method": "GET", "url": "/docs-files/none.js"})[0]
    assert error_of(missing)["code"] == "not_found"
