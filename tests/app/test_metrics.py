from __future__ import annotations

import asyncio
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.errors import ServiceError
from app.metrics import AUTOSCALING_METRICS, INGRESS_METRICS, POOL_METRICS, IngressMetrics, PoolMetrics, _Counts
from app.prometheus import MetricsRelay, merge_pages
from engine.types import TranslationRequest
from tests.app.fakes import FakeTranslator

PAGE_A = """# HELP ray_x_total things
# TYPE ray_x_total counter
ray_x_total{replica="a"} 1.0
# HELP ray_h seconds
# TYPE ray_h histogram
ray_h_bucket{le="1.0",replica="a"} 1.0
ray_h_bucket{le="+Inf",replica="a"} 2.0
ray_h_count{replica="a"} 2.0
ray_h_sum{replica="a"} 3.5
"""
PAGE_B = PAGE_A.replace('"a"', '"b"').replace("ray_x_total{", "ray_x_total{") + "# TYPE ray_only gauge\nray_only 7.0\n"


@contextmanager
def exporter(page: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def samples(page: str) -> set[tuple[str, str, float]]:
    families = list(text_string_to_metric_families(page))
    assert len({family.name for family in families}) == len(families)  # each family once
    return {(s.name, str(sorted(s.labels.items())), s.value) for family in families for s in family.samples}


def test_merging_keeps_every_sample_and_each_family_together() -> None:
    assert samples(merge_pages([PAGE_A, PAGE_B])) == samples(PAGE_A) | samples(PAGE_B)


def test_relay_joins_the_nodes_that_answer() -> None:
    with exporter(PAGE_A) as a, exporter(PAGE_B) as b:
        urls = [a, "http://127.0.0.1:9/metrics", b]
        assert samples(asyncio.run(MetricsRelay(lambda: urls).page())) == samples(PAGE_A) | samples(PAGE_B)
        assert asyncio.run(MetricsRelay(lambda: [a]).page()) == PAGE_A


def test_relay_without_any_answer_is_an_error() -> None:
    with pytest.raises(ServiceError) as error:
        asyncio.run(MetricsRelay(lambda: ["http://127.0.0.1:9/metrics"]).page())
    assert error.value.code == "metrics_unavailable"


def test_names_follow_the_conventions() -> None:
    specs = [*INGRESS_METRICS.values(), *POOL_METRICS.values(), *AUTOSCALING_METRICS.values()]
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert re.fullmatch(r"babelephant_[a-z0-9_]+", spec.name)
        assert spec.help
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert bool(spec.buckets) == (spec.kind == "histogram")
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert "ms" not in spec.name.split("_")


class Recorder:
    """A metric that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((value, tags))


def test_counts_are_added_up_and_handed_over_soon() -> None:
    live = {"requests": Recorder(), "errors": Recorder()}
    counts = _Counts(INGRESS_METRICS, live)

    def many_requests() -> None:
        for status in ("200", "200", "503") * 1000:
            counts.add("requests", 1, "/v1/translate", status)

    def total(status: str) -> float:
        return sum(value for value, tags in live["requests"].calls if tags["status"] == status)

    threads = [threading.Thread(target=many_requests) for _ in range(4)]
    for thread in threads:
        thread.start()
    counts.add("errors", 0, "busy")
    for thread in threads:
        thread.join()
    wait_until(lambda: total("200") == 8000 and total("503") == 4000)  # nothing lost between threads
    assert len(live["requests"].calls) < 100
    counts.add("requests", 5, "/livez", "404")  # after a flush the next one is due again
    wait_until(lambda: live["requests"].calls[-1] == (5, {"route": "/livez", "status": "404"}))
    assert live["errors"].calls == []  # nothing counted, no series


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_every_count_knows_its_labels() -> None:
    """A label too many or too few must not wait for the first flush in production."""
    ingress, pool = IngressMetrics(), PoolMetrics("p")
    request = TranslationRequest("r", "a", "eng_Latn", "deu_Latn")
    ingress.answered("/v1/translate", 200, 0.1, "busy")
    ingress.replica_lost("p", "RayActorError")
    ingress.translated("p", "eng_Latn", "deu_Latn", 1, 3)
    pool.finished(request, FakeTranslator()._translation(request))
    pool.rejected("busy")
    pool.cancelled(2)
    pool.level(FakeTranslator().stats(), 0)
    for metrics in (ingress, pool):
        assert metrics._counts._sums
        metrics._counts.flush()
        assert not metrics._counts._sums
