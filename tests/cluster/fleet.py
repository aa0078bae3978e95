"""The production Serve config on a fake cluster of this machine: a head and three workers with four pretended GPUs.

Two of its pools stay, `world` on nodes labelled `large` and `europe` on `small`, with the demonstration model on the CPU.
The ingress and the only proxy (HeadOnly: fake nodes share one address) are on the head, which no test kills.
"""

from __future__ import annotations

import copy
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
APPLICATION = "babelephant"
STEP_POISON = "poison the step"  # tests.cluster.poisoned: the runner raises in a step that holds this sentence
MEMORY_POISON = "poison the memory"  # an encoder pass of several sentences, one of them this, finds no memory
SLOW_POISON = "poison the clock"  # this replica's decode steps take SLOW_STEP_S from now on, for SLOW_S
SLOW_STEP_S, SLOW_S = 0.15, 8.0
THREAD_POISON = "poison the thread"  # submit raises what is no RequestError
NODES = (("large", 1), ("large", 2), ("small", 1))  # (label node-pool, fake GPUs) of the worker nodes
_SYSTEM_CONFIG = {  # a dead node is noticed within seconds; Ray's defaults take several times as long
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
_PATIENT_CONFIG = {**_SYSTEM_CONFIG, "health_check_timeout_ms": 10_000, "health_check_failure_threshold": 6}
_ENGINE = {"max_rows": 32, "max_source_slots": 16, "encode_token_budget": 1024, "max_waiting": 64}


def production_variant(
    port: int, *, import_path: str = "app.serve:build_app", direct_calls: bool | None = None
) -> dict[str, Any]:
    """production.yaml with what a small machine without GPUs has to change, one replica a pool; args are those of the file
    but for checkpoint, device, limits, the pool that is left out, and direct_calls if given."""
    text = (REPOSITORY / "cluster_configs/serve/production.yaml").read_text(encoding="utf-8")
    raw: dict[str, Any] = json.loads(json.dumps(yaml.safe_load(text)))  # YAML anchors share objects, JSON does not
    raw |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    raw["logging_config"]["encoding"] = "TEXT"
    (application,) = raw["applications"]
    application["import_path"] = import_path
    args = application["args"]
    args["pools"] = {name: args["pools"][name] for name in ("world", "europe")}
    for pool in args["pools"].values():
        del pool["checkpoint"]  # the demonstration model
        pool |= {"device": "cpu", "engine": dict(_ENGINE)}
    args["http"] |= {"max_sentences": 64}
    if direct_calls is not None:
        args["direct_calls"] = direct_calls
    deployments = {d["name"]: d for d in application["deployments"] if d["name"] != "asia"}
    application["deployments"] = list(deployments.values())
    deployments["ingress"]["ray_actor_options"] = {"num_cpus": 0, "label_selector": {"node-pool": "head"}}
    for deployment in deployments.values():
        deployment["autoscaling_config"] = {**deployment["autoscaling_config"], "downscale_delay_s": 0, "upscale_delay_s": 0}
        set_replicas(raw, deployment["name"], 1)
    return raw


def set_replicas(raw: dict[str, Any], name: str, count: int) -> None:
    """A fixed count is min == max: what production.yaml says may be changed on a running fleet."""
    (deployment,) = [d for d in raw["applications"][0]["deployments"] if d["name"] == name]
    deployment["autoscaling_config"] |= {"min_replicas": count, "max_replicas": count}


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.2)


class Fleet:
    """A running cluster with the application on it. `raw` is the Serve config as last deployed."""

    def __init__(self, directory: Path, raw: dict[str, Any], *, patient: bool = False) -> None:
        """patient: for tests that load the machine and kill no node, so that a late heartbeat does not."""
        import ray
        from ray.cluster_utils import Cluster

        self.raw = raw
        self._file = directory / "serve.yaml"
        head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "labels": {"node-pool": "head"}}
        system_config = _PATIENT_CONFIG if patient else _SYSTEM_CONFIG
        self.cluster: Any = Cluster(initialize_head=True, head_node_args={**head, "_system_config": system_config})
        try:
            self.nodes: list[Any] = []
            for label, num_gpus in NODES:
                self.add_node(label, num_gpus)
            ray.init(address=self.cluster.address, log_to_driver=False)
            self.deploy(raw)
            wait_until(lambda: self.request("/readyz")[0] == 200, 60, "readyz")
        except BaseException:
            self.shutdown()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.raw['http_options']['port']}"

    def add_node(self, label: str, num_gpus: int) -> None:
        """A worker node; returns when the cluster knows it."""
        labels = {"node-pool": label}
        self.nodes.append(self.cluster.add_node(num_cpus=1, num_gpus=num_gpus, labels=labels, include_dashboard=False))

    def deploy(self, raw: dict[str, Any], timeout_s: float = 120.0) -> float:
        """Deploy as `serve deploy` would; seconds until every deployment has its replicas and no others."""
        from ray.serve._private.api import serve_start

        from app.serve_config import load_serve_config

        started = time.monotonic()
        self._file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        config = load_serve_config(self._file)
        client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
        client.deploy_apps(config)
        self.raw = raw
        self.wait_settled(timeout_s)
        return time.monotonic() - started

    def scale(self, name: str, count: int) -> float:
        """Change one pool's min and max; seconds until it has that many replicas."""
        raw = copy.deepcopy(self.raw)
        set_replicas(raw, name, count)
        return self.deploy(raw)

    def wait_settled(self, timeout_s: float = 120.0) -> None:
        wait_until(self._settled, timeout_s, "the deployments did not settle")

    def wait_replaced(self, pool: str, dead_pids: set[int], timeout_s: float = 120.0) -> None:
        """Until the pool is whole again without the dead processes; Serve's status alone may not know of the death yet."""

        def replaced() -> bool:
            alive = {int(replica["Pid"]) for replica in self.replicas(pool)} - dead_pids
            return len(alive) == self._wanted()[pool] and self._settled()

        wait_until(replaced, timeout_s, f"the replicas of {pool} were not replaced")

    def _wanted(self) -> dict[str, int]:
        return {d["name"]: d["autoscaling_config"]["min_replicas"] for d in self.raw["applications"][0]["deployments"]}

    def _settled(self) -> bool:
        from ray import serve

        status = serve.status().applications.get(APPLICATION)
        if status is None or status.status != "RUNNING":
            return False
        have = {name: {str(k): n for k, n in d.replica_states.items() if n} for name, d in status.deployments.items()}
        return have == {name: {"RUNNING": count} for name, count in self._wanted().items()}

    def actors(self, name_prefix: str) -> list[Mapping[str, Any]]:
        """Living actors by name: Pid, Address.NodeID and so on as Ray's state tells them."""
        import ray._private.state

        return [
            actor
            for actor in ray._private.state.actors().values()
            if actor["State"] == "ALIVE" and actor["Name"].startswith(name_prefix)
        ]

    def replicas(self, pool: str) -> list[Mapping[str, Any]]:
        return self.actors(f"SERVE_REPLICA::{APPLICATION}#{pool}#")

    def controller_pid(self) -> int:
        (controller,) = self.actors("SERVE_CONTROLLER_ACTOR")
        return int(controller["Pid"])

    def node_of(self, actor: Mapping[str, Any]) -> Any:
        (node,) = [node for node in self.nodes if node.node_id == actor["Address"]["NodeID"]]
        return node

    def remove_node(self, node: Any, *, graceful: bool) -> None:
        """Not graceful: SIGKILL for every process of the node. Graceful: SIGTERM first."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=graceful)

    def request(self, path: str, body: Any = None, timeout_s: float = 90.0) -> tuple[int, dict[str, str], bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def shutdown(self) -> None:
        import ray
        from ray import serve

        try:
            if ray.is_initialized():
                serve.shutdown()  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()
            self.cluster.shutdown()
