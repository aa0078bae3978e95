"""Options that several subcommands share, and what they mean together."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from loadtest.errors import LoadTestError
from loadtest.price import Price
from loadtest.sender import SenderOptions
from loadtest.slo import ServiceLevel
from loadtest.target import Target, parse_target
from loadtest.workload import LoadedWorkload, load_workload, shipped_workloads


def number(text: str) -> float:
    """A finite number (argparse type)."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def processes(text: str) -> int | None:
    """A count, or `auto` (argparse type)."""
    return None if text == "auto" else int(text)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Where to send and what."""
    group = parser.add_argument_group("what is loaded")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the service (default: %(default)s)")
    group.add_argument(
        "--allow-remote", action="store_true", help="permit a service on another machine; only load what is yours"
    )
    group.add_argument(
        "--workload",
        default="interface",
        metavar="NAME|FILE",
        help=f"pairs, lengths and texts: {', '.join(shipped_workloads())}, or a YAML file (default: %(default)s)",
    )
    group.add_argument("--wait-ready", type=number, default=10.0, metavar="S", help="wait so long for /readyz (default: 10)")


def add_promise(parser: argparse.ArgumentParser) -> None:
    """SLO and price."""
    group = parser.add_argument_group("the promise and the price")
    group.add_argument("--slo-ms", type=number, metavar="MS", help="latency limit (default: the workload's)")
    group.add_argument(
        "--percentile", type=number, metavar="P", help="share that must meet it, %% (default: the workload's)"
    )
    group.add_argument("--confidence", type=number, default=0.95, help="of the verdict (default: 0.95; MLPerf uses 0.99)")
    group.add_argument("--price-per-replica-hour", type=number, metavar="USD", help="also print USD per million characters")
    group.add_argument("--replicas", type=int, default=1, metavar="N", help="replicas behind the service (default: 1)")


def add_client(parser: argparse.ArgumentParser) -> None:
    """Bounds of the client."""
    group = parser.add_argument_group("the client")
    group.add_argument("--seed", type=int, default=1, help="of arrivals and texts (default: 1)")
    group.add_argument("--timeout", type=number, default=30.0, metavar="S", help="from the intended send (default: 30)")
    group.add_argument("--max-in-flight", type=int, default=1000, metavar="N", help="requests out at once (default: 1000)")
    group.add_argument(
        "--max-requests", type=int, default=200_000, metavar="N", help="refuse longer schedules (default: 200000)"
    )
    group.add_argument(
        "--max-lag-ms",
        type=number,
        default=10.0,
        metavar="MS",
        help="a run whose p99 of actual minus intended send exceeds this is not valid (default: 10; try 1 if it is quiet)",
    )
    group.add_argument(
        "--retry-connection", action="store_true", help="send once more after a connection error; counted apart"
    )
    group.add_argument(
        "--processes",
        type=processes,
        metavar="N",
        help="that send the schedule in turn (default: auto, which is one up to 400 requests in its busiest second, then "
        "more, but one less than there are cores)",
    )
    group.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_output(parser: argparse.ArgumentParser, stem: str) -> None:
    """Files written."""
    group = parser.add_argument_group("what is written")
    group.add_argument("--label", help="title of the report (default: workload and rate)")
    group.add_argument("--output", type=Path, default=Path(f"{stem}.json"), metavar="FILE", help="default: %(default)s")
    group.add_argument("--html", type=Path, metavar="FILE", help="report (default: beside --output)")


def chosen_target(args: argparse.Namespace) -> Target:
    """The checked target."""
    return parse_target(args.url, allow_remote=args.allow_remote)


def chosen_workload(args: argparse.Namespace) -> LoadedWorkload:
    """The workload."""
    return load_workload(args.workload)


def chosen_slo(args: argparse.Namespace, workload: LoadedWorkload) -> ServiceLevel:
    """The workload's promise, with what the command line changes."""
    slo = workload.workload.slo
    latency_s = slo.latency_s if args.slo_ms is None else args.slo_ms / 1000
    percentile = slo.percentile if args.percentile is None else args.percentile
    if not latency_s > 0 or not 0 < percentile < 100:
        raise LoadTestError("--slo-ms must be above 0 and --percentile between 0 and 100")
    if not 0.5 <= args.confidence < 1:
        raise LoadTestError(f"--confidence is {args.confidence:g}; choose 0.5 up to, not including, 1")
    return ServiceLevel(latency_s=latency_s, percentile=percentile)


def chosen_sender(args: argparse.Namespace) -> SenderOptions:
    """Bounds for the sender."""
    if args.seed < 0:
        raise LoadTestError("--seed cannot be negative")
    return SenderOptions(
        timeout_s=args.timeout,
        max_in_flight=args.max_in_flight,
        retry_connection=args.retry_connection,
        num_processes=args.processes,
    )


def chosen_price(args: argparse.Namespace) -> Price | None:
    """The price, if one is given."""
    return None if args.price_per_replica_hour is None else Price(args.price_per_replica_hour, args.replicas)


def html_path(args: argparse.Namespace) -> Path:
    """Where the report goes."""
    return args.html or Path(args.output).with_suffix(".html")
