"""Serve translations over HTTP on this machine, until Ctrl-C.

Starts Ray, deploys a Serve YAML, waits until every pool answers and prints one line with a request to try. Ctrl-C, SIGTERM
or a closed terminal takes down everything it started. On a cluster use Ray's own `serve deploy` with the same file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from app.settings import resolve_checkpoint
from app.stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

EXAMPLES = """  babelephant serve                                     the demonstration model on the CPU, port 8000
  babelephant serve --port 8001
  babelephant serve cluster_configs/serve/local-gpu.yaml
  babelephant serve my.yaml --host 0.0.0.0              reachable from other machines"""

_DEFAULT_CONFIG = "cluster_configs/serve/local-cpu.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help=f"Serve YAML (default: {_DEFAULT_CONFIG})")
    parser.add_argument("--host", help="address to listen on (default: the YAML's, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the YAML's, 8000)")
    parser.add_argument(
        "--proxy",
        choices=("auto", "haproxy", "python"),
        default="auto",
        help="what stands in front: HAProxy where it is installed (auto), or Ray Serve's own, which is several times slower",
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after S seconds (default: 600)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 after a clean end."""
    started = time.monotonic()
    from app.local_cluster import LocalClusterError, local_service, prepare_environment, require_free_port

    stop = threading.Event()
    try:
        prepare_environment(proxy=args.proxy)
        from app.serve_config import load_serve_config

        config = load_serve_config(args.config or resolve_checkpoint(_DEFAULT_CONFIG), host=args.host, port=args.port)
        if ":" in config.http_options.host and args.proxy != "python":  # what Serve writes for HAProxy does not work there
            raise LocalClusterError(f"{config.http_options.host} is an IPv6 address: add --proxy python")
        require_free_port(config.http_options.host, config.http_options.port)
        print("Starting Ray and loading the model ...", file=sys.stderr, flush=True)
        _interrupt_on_signals()
        with local_service(config, timeout_s=args.timeout) as url:
            print(_ready_line(config, url, time.monotonic() - started), flush=True)
            stop.wait()
    except LocalClusterError as error:
        print(f"babelephant: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # of a terminal that was closed
            print("Stopped.", file=sys.stderr)
    return 0


def _interrupt_on_signals() -> None:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for signum in STOP_SIGNALS:  # SIGINT too: a shell ignores it for what it starts in the background
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # nohup means it
            signal.signal(signum, interrupt)


def _ready_line(config: ServeDeploySchema, url: str, seconds: float) -> str:
    body = json.dumps({"source_lang": "en", "target_lang": "de", "texts": ["Your changes have been saved."]})
    curl = f"curl -s {url}/v1/translate -H 'Content-Type: application/json' -d '{body}'"
    return f"Babelephant is ready on {url} after {seconds:.1f} s. Try: {curl}"
