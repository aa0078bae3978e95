"""Spans of a request, ingress -> replica -> engine, on top of Ray Serve's own OpenTelemetry tracing. Off by default.

On with `tracing_config:` at the top of the Serve YAML: `{enabled: true, exporter_import_path: "app.tracing:otlp_exporter",
sampling_ratio: 0.01}`. Without it every call here is a no-op of the OpenTelemetry API. Spans hold counts, languages and
request ids, never a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, set_span_in_context

from engine.types import Translation

MAX_TRACED_SENTENCES = 16  # of one request: a request may hold hundreds
_tracer = trace.get_tracer("babelephant")  # of whatever provider the process gets later


def _is_off() -> bool:
    """True while nobody set a tracer provider: the API's own no-op spans cost more than a whole sentence's metrics."""
    return isinstance(_tracer, trace.ProxyTracer) and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[Span]:
    """A span around a block, child of the current one; without tracing it records nothing."""
    if _is_off():
        yield trace.INVALID_SPAN
        return
    with _tracer.start_as_current_span(name, attributes=attributes) as current:
        yield current


def past_span(name: str, parent: Mapping[str, str], started_at_s: float, **attributes: str | int) -> Span:
    """A span that began at `started_at_s` (epoch seconds) under a `carrier` from another process; `end` it."""
    if not parent or _is_off():
        return trace.INVALID_SPAN
    return _tracer.start_span(name, propagate.extract(parent), attributes=attributes, start_time=int(started_at_s * 1e9))


def carrier() -> dict[str, str]:
    """The current span in a form that may travel; empty without tracing."""
    headers: dict[str, str] = {}
    if not _is_off():
        propagate.inject(headers)
    return headers


def record_sentences(parent: Span, translations: Sequence[Translation], started_at_s: float) -> None:
    """What the engine measured, as spans under `parent`: queue, encode and decode of each of the first sentences.

    started_at_s: epoch seconds at which the call came in. The engine reports durations only, so the spans of a sentence are
    laid end to end from there, up to one engine step early.
    """
    if not parent.is_recording():
        return
    context = set_span_in_context(parent)
    for index, translation in enumerate(translations[:MAX_TRACED_SENTENCES]):
        timings = translation.timings
        attributes: dict[str, str | int] = {
            "sentence": index,
            "source_tokens": translation.num_source_tokens,
            "target_tokens": translation.num_target_tokens,
            "finish_reason": translation.finish_reason.value,
        }
        begin_ns = int(started_at_s * 1e9)
        for name, seconds in (("queue", timings.queue_s), ("encode", timings.encode_s), ("decode", timings.decode_s)):
            end_ns = begin_ns + int(seconds * 1e9)
            step = _tracer.start_span(f"engine.{name}", context, attributes=attributes, start_time=begin_ns)
            step.end(end_ns)
            begin_ns = end_ns


def otlp_exporter() -> list[Any]:
    """For `exporter_import_path`: sends spans by OTLP over HTTP to OTEL_EXPORTER_OTLP_ENDPOINT (default localhost:4318).

    Raises ImportError with the fix where the exporter is missing.
    """
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ImportError("sending spans needs the OTLP exporter: pip install 'babelephant[tracing]'") from error
    return [BatchSpanProcessor(OTLPSpanExporter())]
