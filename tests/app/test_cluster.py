"""The whole path, once: `babelephant serve`, two pools of the demonstration model on real Ray, HTTP, a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from app.metrics import INGRESS_METRICS, POOL_METRICS
from engine.accounting import expert_bytes
from engine.config import ModelConfig
from tests.app.served import (
    REPOSITORY,
    USD_PER_HOUR,
    Metrics,
    Served,
    replicas,
    running_service,
    session_processes,
    spans,
    wait_for_metrics,
    wait_until,
)

pytestmark = pytest.mark.real_time


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_service(tmp_path_factory.mktemp("cluster")) as service:
        yield service


def test_two_pools_over_http(served: Served) -> None:
    german = served.translate("en", "de", "Cancel", "", "Open file\n  March 5, 2031")
    japanese = served.translate("en", "ja", "Cancel", "March 5, 2031")
    assert (german["pool"], japanese["pool"]) == ("main", "asia")
    assert [t["finish_reason"] for t in german["translations"]] == ["eos", "empty", "eos"]
    assert german["translations"][0]["text"] == "Abbrechen"
    assert german["translations"][2]["text"].endswith("\n  5. März 2031")
    assert japanese["translations"][1]["text"] == "2031年3月5日"
    again = served.translate("eng_Latn", "deu_Latn", "March 5, 2031", "Cancel", "Save as", beam_size=4)
    assert again["translations"][1] == {**german["translations"][0], "timings": again["translations"][1]["timings"]}


def test_headers_and_errors_through_serves_proxy(served: Served) -> None:
    status, headers, _ = served.request("/livez", **{"X-Request-ID": "mine"})
    assert (status, headers["x-request-id"]) == (200, "mine")
    good = {"source_lang": "en", "target_lang": "de", "texts": ["a"]}
    cases = [
        ("/v1/translate", b"{", 400, "invalid_json"),
        ("/v1/translate", {**good, "target_lang": "xx"}, 422, "unknown_language"),
        ("/v1/translate", {**good, "target_lang": "sw"}, 422, "unsupported_language"),
        ("/v1/translate", {**good, "texts": []}, 422, "invalid_request"),
        ("/v1/translate", {**good, "timeout_s": 1e-6}, 504, "deadline_exceeded"),
        ("/v1/translate", b"x" * 10_000_000, 413, "body_too_large"),
        ("/nope", None, 404, "not_found"),
        ("/livez", b"{}", 405, "method_not_allowed"),
    ]
    for path, body, expected, code in cases:
        status, headers, answer = served.request(path, body)
        error = json.loads(answer)["error"]
        assert (status, error["code"]) == (expected, code)
        assert error["request_id"] == headers["x-request-id"]


def test_client_that_hangs_up_frees_the_engine(served: Served) -> None:
    body = json.dumps(
        {"source_lang": "en", "target_lang": "de", "texts": ["Your changes have been saved. " * 20] * 100, "beam_size": 8}
    ).encode()
    host, port = served.url.removeprefix("http://").split(":")
    head = ["POST /v1/translate HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    for _ in range(4):  # HAProxy with its fast forwarding misses about every second of these
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
            wait_until(lambda: loads(served) > [0])
        wait_until(lambda: loads(served) == [0])
    # Between 400 and 500: a sentence of an earlier test whose deadline ran out counts too if its ingress gave up first.
    wait_until(lambda: Metrics(served)("cancelled_sentences_total", pool="main") // 100 == 4)


def loads(served: Served) -> list[int]:
    """Sentences in the main pool's engine; nothing where its replica did not answer in time."""
    return [replica["num_waiting"] + replica["num_running"] for replica in replicas(served, "main")]


def test_concurrent_requests_all_come_back(served: Served) -> None:
    with ThreadPoolExecutor(16) as clients:
        targets = ["de", "ja"] * 12
        answers = list(clients.map(lambda target: served.translate("en", target, "Cancel", "Save as"), targets))
    assert {answer["pool"] for answer in answers} == {"main", "asia"}
    assert len({answer["translations"][0]["text"] for answer in answers if answer["pool"] == "main"}) == 1


def test_metrics_of_all_processes(served: Served) -> None:
    """Every metric that one successful, one failed and one cancelled request can move is on the page, with our labels."""
    served.translate("en", "de", "Cancel")
    expected = {spec.name for spec in (*INGRESS_METRICS.values(), *POOL_METRICS.values())}
    unmoved = ("rejections", "cancelled", "retried", "refused_connections")
    expected -= {POOL_METRICS[key].name for key in unmoved} | {INGRESS_METRICS["lost_calls"].name}

    def check(metrics: Metrics) -> None:
        names = {re.sub(r"_(bucket|count|sum)$", "", sample.name.removeprefix("ray_")) for sample in metrics.samples}
        assert expected <= names

    wait_for_metrics(served, check)


def test_metrics_of_direct_calls_are_true(served: Served) -> None:
    for _ in range(5):
        served.translate("en", "de", "Cancel", "Save as")
    way = {"pool": "main", "way": "direct"}

    def check(metrics: Metrics) -> None:
        num_ended = metrics("replica_calls_total", **way)
        assert metrics("replica_calls_total", **way, result="translated") >= 5
        assert metrics("replica_call_seconds_count", **way) == num_ended
        assert 0 < metrics("replica_call_seconds_sum", **way) / num_ended < 60
        assert metrics("linked_replicas", pool="main") == 1
        assert metrics("open_calls", **way) == 0

    wait_for_metrics(served, check)


def test_metrics_of_work_memory_and_money_are_true(served: Served) -> None:
    served.translate("en", "de", "Cancel", "Save as", beam_size=4)
    config = ModelConfig.from_checkpoint(REPOSITORY / "engine/demo/checkpoint")

    def check(metrics: Metrics) -> None:
        steps, rows = (metrics(f"{key}_total", pool="main") for key in ("decode_steps", "decoded_rows"))
        assert 0 < steps <= rows <= steps * metrics("max_rows", pool="main")
        assert metrics("memory_bytes", pool="main", part="experts") == expert_bytes(config, "fp32")
        assert metrics("cost_usd_total", pool="main") > 0

    wait_for_metrics(served, check)
    metrics = Metrics(served)
    most_usd = (time.monotonic() - served.started_s) * USD_PER_HOUR / 3600  # a replica pays for its start too
    assert metrics("cost_usd_total", pool="main") <= most_usd
    assert metrics("cost_usd_total", pool="asia") == 0  # no price, no cost


def test_metrics_of_experts_are_true(served: Served) -> None:
    """On a CPU every pass is looked at: two experts for each source token and live row, in every sparse layer."""
    served.translate("en", "ja", "Cancel", "Save as", beam_size=4)
    config = ModelConfig.from_checkpoint(REPOSITORY / "engine/demo/checkpoint")

    def check(metrics: Metrics) -> None:
        def total(key: str, **labels: str) -> float:
            return metrics(f"{key}_total", pool="asia", **labels)

        for stage, stack, passes in (("encode", "encoder", "encode_passes"), ("decode", "decoder", "decode_steps")):
            layers = getattr(config, f"{stack}_layers")
            sparse = [str(layer) for layer in range(layers) if config.is_sparse(stack, layer)]  # type: ignore[arg-type]
            for layer in sparse:
                labels = {"stage": stage, "layer": layer}
                assert 0 < total("sampled_expert_passes", **labels) == total(passes)
                active = total("sampled_active_experts", **labels) / total("sampled_expert_passes", **labels)
                assert 2 <= active <= config.num_experts
                skew = metrics("expert_load_skew_ratio", pool="asia", **labels)
                share = metrics("busiest_expert_share_ratio", pool="asia", **labels)
                assert 1 <= skew == pytest.approx(share * config.num_experts)
            assert total("sampled_expert_passes", stage=stage) == len(sparse) * total(passes)
            if stage == "encode":
                assert total("sampled_expert_tokens", stage=stage) == 2 * len(sparse) * total("source_tokens")

    wait_for_metrics(served, check)
    wait_until(
        lambda: [load["stage"] for one in replicas(served, "asia") for load in one["expert_loads"]] == ["encode", "decode"]
    )


def test_a_trace_leads_from_the_proxy_to_the_engines_steps(served: Served) -> None:
    trace_id, client = "af" * 16, "b7" * 8
    body = {"source_lang": "en", "target_lang": "de", "texts": ["Cancel", "Save as"]}
    assert served.request("/v1/translate", body, traceparent=f"00-{trace_id}-{client}-01")[0] == 200

    def is_one_tree() -> bool:
        """Nothing hangs in the air; processes write their spans in no certain order."""
        seen = spans(served, trace_id)
        known = {f"0x{client}"} | {span["context"]["span_id"] for span in seen}
        steps = sum(span["name"].startswith("engine.") for span in seen)
        return steps == 6 and all(span["parent_id"] in known for span in seen)

    wait_until(is_one_tree)
    found = {span["context"]["span_id"]: span for span in spans(served, trace_id)}
    chain = [span for span in found.values() if span["name"] == "engine.decode"][:1]
    while chain[-1]["parent_id"] in found:
        chain.append(found[chain[-1]["parent_id"]])
    names = [span["name"] for span in chain]
    assert names.index("replica.translate") < names.index("translate") < len(names) - 1, names
    steps = [span["name"] for span in found.values() if span["parent_id"] == chain[1]["context"]["span_id"]]
    assert sorted(steps) == ["engine.decode"] * 2 + ["engine.encode"] * 2 + ["engine.queue"] * 2
    assert spans(served, "00" * 16) == []
    assert {span["context"]["trace_id"] for span in spans(served)} == {f"0x{trace_id}"}  # others were not sampled


def test_logs_name_requests_and_hold_no_text(served: Served) -> None:
    """A word of ours in every part of a body that can go right or wrong; then in no file that the service wrote."""
    word = "Quokkazanzibar"
    good = {"source_lang": "en", "target_lang": "de", "texts": [f"The {word} has been saved."]}
    requests: list[tuple[Any, int]] = [
        (good, 200),
        ({**good, "texts": [word, "", f"{word}\n" * 3]}, 200),
        ({**good, "texts": [f"{word} " * 400]}, 422),  # too many tokens
        ({**good, "texts": [word * 1000]}, 422),  # too many characters
        ({**good, "texts": word}, 422),
        ({**good, "target_lang": word}, 422),
        ({**good, word: word}, 422),
        ({**good, "timeout_s": 1e-6}, 504),
        (f'{{"texts": ["{word}"'.encode(), 400),
        (word.encode() * 100_000, 413),
    ]
    for number, (body, expected) in enumerate(requests):
        status, _, answer = served.request("/v1/translate", body, **{"X-Request-ID": f"quiet-{number}"})
        assert status == expected, answer

    def log_lines() -> list[dict[str, Any]]:
        """Of the ingress; without what is being written."""
        paths = (served.logs / "serve").glob("replica_*ingress*")
        return [json.loads(line) for path in paths for line in path.read_text().split("\n")[:-1]]

    wait_until(lambda: {f"quiet-{i}" for i in range(len(requests))} <= {line.get("request_id") for line in log_lines()})
    written = {}
    for path in served.logs.rglob("*"):
        with suppress(FileNotFoundError):  # Ray takes some away again
            if path.is_file():
                written[path] = path.read_bytes()
    assert len(written) > 10
    assert [path for path, content in written.items() if word.encode() in content] == []


def test_ready_line_holds_a_request_that_can_be_pasted(served: Served) -> None:
    curl = served.ready_line.partition("Try: ")[2]
    assert curl.startswith(f"curl -s {served.url}/v1/translate ")
    body = re.search(r"-d '(.*)'", curl)
    assert body is not None
    assert served.request("/v1/translate", body.group(1).encode())[0] == 200


def test_interrupt_ends_everything_with_status_0(served: Served) -> None:
    """Last in this file: Ctrl-C reaches the whole foreground process group, as a terminal would send it."""
    before = session_processes(served.process.pid)
    assert len(before) > 5
    os.killpg(served.process.pid, signal.SIGINT)
    assert served.process.wait(120) == 0
    wait_until(lambda: not session_processes(served.process.pid))
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=1):
        pass
