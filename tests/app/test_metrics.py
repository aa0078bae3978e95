from __future__ import annotations

import asyncio
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.errors import ServiceError
from app.metrics import AUTOSCALING_METRICS, INGRESS_METRICS, POOL_METRICS
from app.prometheus import MetricsRelay, merge_pages

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
