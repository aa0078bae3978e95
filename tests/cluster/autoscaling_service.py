"""A service with our policy on a one-node cluster of fake GPUs, its decision log, and a load of many sentences."""

from __future__ import annotations

import copy
import http.client
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.fleet import wait_until

APPLICATION = "babelephant"
OUTAGE_VARIABLE = "STAND_IN_OUTAGE"  # names a file: while it exists, stand-ins report no numbers
PAIRS = {"main": ("en", "de"), "slow": ("en", "fr"), "rare": ("en", "ja"), "sleepy": ("fr", "en")}


class Service:
    """Starts Ray and the application of `raw`; `log_path` is where its policy writes."""

    def __init__(self, raw: dict[str, Any], directory: Path, num_gpus: int) -> None:
        import ray

        self.raw = raw
        self.directory = directory
        self.log_path = Path(raw["applications"][0]["autoscaling_policy"]["policy_kwargs"]["log_path"])
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 1024 * 1024,
        )
        try:
            self.deploy(raw)
            wait_until(self._running, 90, "the application does not run")
            wait_until(lambda: self.request("GET", "/readyz")[0] == 200, 30, "readyz")
        except BaseException:
            self.shutdown()
            raise

    def _running(self) -> bool:
        from ray import serve

        application = serve.status().applications.get(APPLICATION)
        assert application is None or application.status != "DEPLOY_FAILED", application.message
        return application is not None and application.status == "RUNNING"

    def deploy(self, raw: dict[str, Any]) -> None:
        """As `serve deploy`; returns at once."""
        from ray.serve._private.api import serve_start

        from app.serve_config import load_serve_config

        self.raw = copy.deepcopy(raw)
        file = self.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        config = load_serve_config(file)
        client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        client.deploy_apps(config)

    def edit_limits(self, pool: str, minimum: int, maximum: int) -> None:
        """What an operator does by hand: other limits for one pool."""
        raw = copy.deepcopy(self.raw)
        (deployment,) = [d for d in raw["applications"][0]["deployments"] if d["name"] == pool]
        deployment["autoscaling_config"] |= {"min_replicas": minimum, "max_replicas": maximum}
        self.deploy(raw)

    def running(self, pool: str) -> int:
        """Replicas that serve, as Serve says."""
        from ray import serve

        states = serve.status().applications[APPLICATION].deployments[pool].replica_states
        return sum(count for state, count in states.items() if str(state).endswith("RUNNING"))

    def decisions(self, pool: str, since_s: float = 0.0) -> list[dict[str, Any]]:
        """One pool's part of the log, made after `since_s` (epoch, real time)."""
        header, *lines = self.log_path.read_text(encoding="utf-8").splitlines()
        settings = json.loads(header)["settings"]
        index = list(settings["pools"]).index(pool)
        records = map(json.loads, lines)
        return [
            {key: value[index] if isinstance(value, list) else value for key, value in record.items()}
            for record in records
            if record["time_s"] >= since_s * settings["clock_scale"]
        ]

    def target(self, pool: str) -> int:
        """Of the latest decision."""
        return int(self.decisions(pool)[-1]["target"])

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.raw["http_options"]["port"], timeout=90)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """The pools of GET /v1/status by name."""
        status, body = self.request("GET", "/v1/status")
        assert status == 200, body
        return {pool["name"]: pool for pool in json.loads(body)["pools"]}

    def translate(self, pool: str, num_texts: int) -> str:
        """What became of one request: `200`, or status and error code."""
        source, target = PAIRS[pool]
        body = {"source_lang": source, "target_lang": target, "texts": ["Word"] * num_texts, "timeout_s": 60}
        status, answer = self.request("POST", "/v1/translate", body)
        if status == 200:
            texts = [translation["text"] for translation in json.loads(answer)["translations"]]
            assert texts == [texts[0]] * num_texts
            assert texts[0]
            return "200"
        return f"{status} {json.loads(answer)['error']['code']}"

    @contextmanager
    def load(self, pool: str, sentences_per_s: float, texts_per_request: int = 20) -> Iterator[Counter[str]]:
        """Open loop at an even pace while the block runs; then what became of all requests."""
        statuses: Counter[str] = Counter()
        stop = threading.Event()
        interval_s = texts_per_request / sentences_per_s

        def once() -> None:
            try:
                statuses[self.translate(pool, texts_per_request)] += 1
            except Exception as error:
                statuses[repr(error)] += 1

        def pace(clients: ThreadPoolExecutor) -> None:
            next_s = time.monotonic()
            while not stop.wait(max(next_s - time.monotonic(), 0.0)):
                next_s += interval_s
                clients.submit(once)

        with ThreadPoolExecutor(256) as clients:
            pacer = threading.Thread(target=pace, args=(clients,), daemon=True)
            pacer.start()
            try:
                yield statuses
            finally:
                stop.set()
                pacer.join()

    def shutdown(self) -> None:
        import ray
        from ray import serve

        try:
            serve.shutdown()  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()


def stand_in_config(
    port: int, pools: dict[str, dict[str, Any]], policy: dict[str, Any], import_path: str, max_waiting: int = 128
) -> dict[str, Any]:
    """Serve config with these pools: autoscaling_config entries by pool; `policy` becomes policy_kwargs; max_waiting
    sentences wait in a replica before it refuses.
    """
    metrics_interval_s = 0.5
    deployments = [
        {
            "name": name,
            "ray_actor_options": {"num_cpus": 0, "num_gpus": 1},
            "autoscaling_config": {
                "metrics_interval_s": metrics_interval_s,
                "look_back_period_s": 5 * metrics_interval_s,
                "upscale_delay_s": 0,
                "downscale_delay_s": 0,
                **limits,
            },
        }
        for name, limits in pools.items()
    ]
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": import_path,
                "args": {
                    "pools": {
                        name: {
                            "pairs": ["*-*"] if name == "main" else ["-".join(PAIRS[name])],
                            "engine": {"max_waiting": max_waiting},
                        }
                        for name in pools
                    },
                    "http": {"max_sentences": 128},
                },
                "autoscaling_policy": {
                    "policy_function": "app.autoscaling.serve_policy:FleetAutoscaler",
                    "policy_kwargs": policy,
                },
                "deployments": [{"name": "ingress", "num_replicas": 1}, *deployments],
            }
        ],
    }


def outage_file(directory: Path) -> Path:
    """Set the variable that stand-ins read, before Ray starts; the file does not exist yet."""
    file = directory / "outage"
    os.environ[OUTAGE_VARIABLE] = str(file)
    return file
