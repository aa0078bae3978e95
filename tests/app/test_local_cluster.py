from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.cli import main
from app.local_cluster import (
    LocalClusterError,
    free_ports,
    prepare_environment,
    require_free_port,
    require_gpus,
)
from app.serve_config import load_serve_config


def test_busy_port_is_named_with_the_way_out() -> None:
    (port,) = free_ports(1)  # not of the range from which the system serves others as soon as it is free again
    message = f"127.0.0.1:{port} .*--port {port + 1}.*make run PORT={port + 1}"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(LocalClusterError, match=message):
        require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
    with pytest.raises(LocalClusterError, match=r"198\.51\.100\.7"):
        require_free_port("198.51.100.7", port)  # nobody's address


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_every_cluster_gets_its_own_token_and_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ, RAY_USAGE_STATS_ENABLED="1"))
    prepare_environment()
    first = os.environ["RAY_AUTH_TOKEN"]
    prepare_environment()
    assert len(first) == 64
    assert os.environ["RAY_AUTH_TOKEN"] != first
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_haproxy_takes_three_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    monkeypatch.setattr("os.environ", environment)
    prepare_environment(proxy="python")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment
    prepare_environment()  # ray[serve] has brought it
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert len({value for key, value in environment.items() if key.endswith("_PORT") and key.startswith("RAY_")}) == 3


def test_without_haproxy_serves_own_proxy_stands_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    prepare_environment()
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment
    with pytest.raises(LocalClusterError, match="--proxy python"):
        prepare_environment(proxy="haproxy")


def test_haproxy_starts_without_fast_forwarding_and_shows_its_pages_here_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))
    prepare_environment(proxy="haproxy")
    script = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.parent.stat().st_mode) == 0o700
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "global\n  maxconn 10\ndefaults\n  mode http\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n"
        "frontend pages\n  bind :18123\nfrontend ours\n  bind 0.0.0.0:18124\nlisten stats\n  bind *:18125\n  stats enable\n"
    )
    done = subprocess.run([script, "-c", "-f", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # the real HAProxy finds the file good
    binds = [line.split()[1] for line in config.read_text().splitlines() if "bind" in line]
    assert binds == ["127.0.0.1:18123", "0.0.0.0:18124", "127.0.0.1:18125"]
    assert " -dF " in script.read_text()


_STARTER = """
import os, subprocess, sys, time
from app.local_cluster import prepare_environment
prepare_environment(proxy="haproxy")
subprocess.Popen([os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", sys.argv[1]])
time.sleep(600)
"""


def test_haproxy_does_not_outlive_a_service_that_is_killed(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n  mode http\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n"
        f"frontend ours\n  bind 127.0.0.1:{port}\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # of earlier tests
    environment["TMPDIR"] = str(tmp_path)  # who is killed does not tidy up
    service = subprocess.Popen([sys.executable, "-c", _STARTER, config], stderr=subprocess.DEVNULL, env=environment)
    try:
        eventually(lambda: listens(port))
    finally:
        service.kill()
        service.wait()
    eventually(lambda: not listens(port))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def eventually(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_an_address_of_another_machine_is_no_matter_of_the_port() -> None:
    with pytest.raises(LocalClusterError, match="--host") as caught:
        require_free_port("198.51.100.7", 18_000)
    assert "--port" not in str(caught.value)


def test_an_ipv6_address_wants_serves_own_proxy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))
    assert main(["serve", "--host", "::1", "--port", "18099"]) == 1
    assert "babelephant: error: ::1 is an IPv6 address: add --proxy python\n" in capsys.readouterr().err


def test_missing_gpus_are_said_before_serve_waits_for_them() -> None:
    folder = Path(__file__).parents[2] / "cluster_configs" / "serve"
    require_gpus(load_serve_config(folder / "local-cpu.yaml"), 0)
    local = load_serve_config(folder / "local-gpu.yaml")
    require_gpus(local, 1)
    with pytest.raises(LocalClusterError, match=r"asks for 1 GPU, this machine has 0; .*local-cpu\.yaml"):
        require_gpus(local, 0)
    production = load_serve_config(folder / "production.yaml")  # three pools, at least one replica each
    require_gpus(production, 3)
    with pytest.raises(LocalClusterError, match="asks for 3 GPUs, this machine has 2; lower"):
        require_gpus(production, 2)
