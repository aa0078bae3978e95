"""Spans in this process, from a recording tracer; the whole way over Ray is in test_cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app import tracing
from tests.app.conftest import Service

Make = Callable[..., Service]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    return memory


def translate(service: Service, texts: list[str], **headers: str) -> int:
    async def scenario() -> int:
        async with service.client() as client:
            body = {"source_lang": "en", "target_lang": "de", "texts": texts}
            response = await client.post("/v1/translate", json=body, headers=headers)
            return response.status_code

    return asyncio.run(scenario())


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def test_spans_of_a_request_are_one_tree_and_hold_no_text(make_service: Make, exporter: InMemorySpanExporter) -> None:
    assert translate(make_service(), ["hush a b", "hush"], **{"X-Request-ID": "mine"}) == 200
    (ingress,), (replica,) = named(exporter, "translate"), named(exporter, "replica.translate")
    assert (ingress.parent, replica.parent) == (None, ingress.context)
    assert ingress.attributes == {"request_id": "mine", "texts": 2, "pool": "main", "pair": "eng_Latn-deu_Latn"}
    assert replica.attributes == {"pool": "fake", "sentences": 2}
    steps = [span for span in exporter.get_finished_spans() if span.name.startswith("engine.")]
    assert [span.name for span in steps] == ["engine.queue", "engine.encode", "engine.decode"] * 2
    for span in steps:
        assert span.parent == replica.context
        assert span.attributes is not None
        assert span.attributes["finish_reason"] == "eos"
    durations = [(span.end_time or 0) - (span.start_time or 0) for span in steps]
    assert durations == pytest.approx([3e6, 2e6, 3e6, 1e6, 2e6, 3e6], abs=1)  # ns: the fake's timings of 3 words and of 1
    assert [span.start_time for span in steps[1:3]] == [span.end_time for span in steps[:2]]
    assert "hush" not in "".join(span.to_json() for span in exporter.get_finished_spans()).lower()


def test_only_the_first_sentences_are_traced(make_service: Make, exporter: InMemorySpanExporter) -> None:
    many = tracing.MAX_TRACED_SENTENCES + 4
    service = make_service(http={"max_sentences": 64, "max_texts": 64})
    service.translators["main"].max_waiting = 64
    assert translate(service, ["a"] * many) == 200
    assert len(named(exporter, "engine.decode")) == tracing.MAX_TRACED_SENTENCES


def test_a_refused_request_has_no_engine_spans(make_service: Make, exporter: InMemorySpanExporter) -> None:
    assert translate(make_service(), ["a " * 30]) == 422
    assert len(named(exporter, "replica.translate")) == 1
    assert not [span for span in exporter.get_finished_spans() if span.name.startswith("engine.")]


def test_without_tracing_nothing_records() -> None:
    with tracing.span("translate", request_id="a") as current:
        assert not current.is_recording()


def test_a_missing_exporter_names_the_fix() -> None:
    try:
        import opentelemetry.exporter.otlp.proto.http  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"babelephant\[tracing\]"):
            tracing.otlp_exporter()
    else:
        processors: list[Any] = tracing.otlp_exporter()
        assert len(processors) == 1
        processors[0].shutdown()
