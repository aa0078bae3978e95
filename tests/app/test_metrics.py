from __future__ import annotations

import asyncio
import dataclasses
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import app.metric_export
from app.errors import ServiceError
from app.metric_export import Counts, Soon
from app.metric_recorders import IngressMetrics, PoolMetrics
from app.metrics import AUTOSCALING_METRICS, INGRESS_METRICS, POOL_METRICS
from app.prometheus import MetricsRelay, merge_pages
from app.settings import resolve_checkpoint
from engine.accounting import plan_memory
from engine.config import EngineConfig, ModelConfig
from engine.types import ExpertLoad, TranslationRequest
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


def test_relay_joins_the_nodes_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.prometheus._TIMEOUT_S", 60.0)  # a busy machine is no node that does not answer
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


def test_the_readme_lists_every_metric() -> None:
    text = (Path(app.metric_export.__file__).parent / "README.md").read_text(encoding="utf-8")
    listed = [tuple(row) for row in re.findall(r"^\| `(babelephant_\w+)` \| ([\w, ]+) \| (.+) \|$", text, re.MULTILINE)]
    specs = [*INGRESS_METRICS.values(), *POOL_METRICS.values(), *AUTOSCALING_METRICS.values()]
    assert listed == [(spec.name, ", ".join(spec.labels), spec.help) for spec in specs]
    kinds = {"total": "counter", "seconds": "histogram", "texts": "histogram"}  # the rule that stands above the table
    for spec in specs:
        assert spec.kind == kinds.get(spec.name.rsplit("_", 1)[1], "gauge")


class Recorder:
    """A metric that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((value, tags))

    set = inc


def test_counts_are_added_up_and_handed_over_soon() -> None:
    live = {"requests": Recorder(), "errors": Recorder()}
    counts = Counts(INGRESS_METRICS, live)

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
    give_up_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


LOAD = ExpertLoad("decode", (1, 3), 8, (64, 64), (20, 61), (2.5, 1.5), (0.3, 0.2))


def test_expert_loads_are_counted_once_and_not_at_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.metric_export, "_REPEAT_S", 1000.0)
    pool, stats = PoolMetrics("p"), FakeTranslator().stats()
    pool._counts._soon = Soon(pool._counts.flush, 1000.0)  # not before the test does
    live = {key: Recorder() for key in POOL_METRICS}
    pool._live.update(live)
    later = dataclasses.replace(LOAD, num_passes=10, num_tokens=(80, 80), num_active=(25, 75), skew=(2.0, 1.0))
    encode = dataclasses.replace(LOAD, stage="encode", layers=(5,), num_passes=1)

    def shown(now_s: float, *loads: ExpertLoad) -> None:
        monkeypatch.setattr("app.metric_recorders.time.monotonic", lambda: now_s)
        pool.level(dataclasses.replace(stats, expert_loads=loads), 0)

    shown(100.0)  # nothing has run: nothing to say, and nothing to wait for
    shown(101.0, LOAD)
    shown(102.0, later)  # too soon
    shown(106.5, later, encode)
    shown(120.0, later, encode)  # no news
    pool._counts.flush()

    def series(key: str) -> list[tuple[float, str, str]]:
        assert {tags["pool"] for _, tags in live[key].calls} == {"p"}
        return [(value, tags["stage"], tags["layer"]) for value, tags in live[key].calls]

    assert series("expert_passes") == [(10, "decode", "1"), (10, "decode", "3"), (1, "encode", "5")]
    assert series("expert_tokens") == [(80, "decode", "1"), (80, "decode", "3"), (64, "encode", "5")]
    assert series("active_experts") == [(25, "decode", "1"), (75, "decode", "3"), (20, "encode", "5")]
    assert series("expert_skew") == [
        (2.5, "decode", "1"),
        (1.5, "decode", "3"),
        (2.0, "decode", "1"),
        (1.0, "decode", "3"),
        (2.5, "encode", "5"),
    ]
    assert len(series("busiest_expert")) == 5


def test_levels_are_set_again_because_rays_exporter_forgets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.metric_export, "_REPEAT_S", 0.0)
    ingress, pool = IngressMetrics(), PoolMetrics("p")
    plan = plan_memory(ModelConfig.from_checkpoint(resolve_checkpoint("engine/demo/checkpoint")), EngineConfig())
    pool.memory(plan)
    pool.level(dataclasses.replace(FakeTranslator().stats(), expert_loads=(LOAD,)), 0)
    ingress.linked("p", 2)
    for metrics in (ingress, pool):
        metrics._live.update({key: Recorder() for key in metrics._live})
    ingress.repeat_levels()
    pool.level(FakeTranslator().stats(), 0)
    assert ingress._live["linked"].calls == [(2, {"pool": "p"})]
    memory = {tags["part"]: size for size, tags in pool._live["memory"].calls}
    assert memory["experts"] == plan.experts_bytes
    assert len(memory) == 6
    assert [value for value, _ in pool._live["expert_skew"].calls] == [2.5, 1.5]
    monkeypatch.setattr(app.metric_export, "_REPEAT_S", 60.0)
    pool.level(FakeTranslator().stats(), 0)
    pool.level(FakeTranslator().stats(), 0)  # many times a second under load
    assert len(pool._live["memory"].calls) == 12


def test_every_count_knows_its_labels() -> None:
    """A label too many or too few must not wait for the first flush in production."""
    ingress, pool = IngressMetrics(), PoolMetrics("p")
    request = TranslationRequest("r", "a", "eng_Latn", "deu_Latn")
    ingress.answered("/v1/translate", 200, 0.1, "busy")
    ingress.replica_lost("p", "RayActorError")
    ingress.call_began("p", "direct")
    ingress.call_ended("p", "direct", "translated", 0.1)
    ingress.linked("p", 2)
    ingress.translated("p", "eng_Latn", "deu_Latn", 1, 3)
    pool.finished(request, FakeTranslator()._translation(request))
    pool.rejected("busy")
    pool.connection_refused("late")
    pool.cancelled(2)
    pool.level(dataclasses.replace(FakeTranslator().stats(), expert_loads=(LOAD,)), 0)
    for metrics in (ingress, pool):
        assert metrics._counts._sums
        metrics._counts.flush()
        assert not metrics._counts._sums
