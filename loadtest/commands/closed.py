"""Keep some clients busy, one number of them after another, and measure."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from loadtest.closed_loop import Level, LevelRecord, default_processes, run_level
from loadtest.commands import options
from loadtest.errors import LoadTestError
from loadtest.gpu_busy import GpuBusy
from loadtest.latency import summarise
from loadtest.outcomes import Outcome
from loadtest.results import ClosedLoopResult, Counts, LevelResult, save_result
from loadtest.target import wait_until_ready

EXAMPLES = """\
  python -m loadtest closed
  python -m loadtest closed --clients 1,32,256 --workload single --duration 10

Each client sends its next request when its last one is answered, so the service is never asked for more than it can do: this
shows requests/s at a concurrency, not a latency that holds under traffic (`run` and `knee` show that). GPU busy is
nvidia-smi's share of time in which any kernel ran on this machine, so the service must run here too.
Exit status: 0 measured, 1 some requests were not answered with a translation, 2 bad input."""
_MAX_CPU_FRACTION = 0.85  # of a client process: beyond it the figures are the client's as much as the service's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_target(parser)
    group = parser.add_argument_group("the clients")
    group.add_argument("--clients", default="1,8,32", metavar="N,N,...", help="at once (default: %(default)s)")
    group.add_argument(
        "--duration", type=options.number, default=10.0, metavar="S", help="measured at each number (default: 10)"
    )
    group.add_argument("--warmup", type=options.number, default=2.0, metavar="S", help="not measured, each (default: 2)")
    group.add_argument("--timeout", type=options.number, default=30.0, metavar="S", help="of a request (default: 30)")
    group.add_argument("--processes", type=int, metavar="N", help="that send (default: a quarter of the cores)")
    group.add_argument("--seed", type=int, default=1, help="of pairs and texts (default: 1)")
    group.add_argument("--no-progress", action="store_true", help="no progress bar")
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--output", type=Path, default=Path("loadtest-closed.json"), metavar="FILE", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    target, workload, levels = options.chosen_target(args), options.chosen_workload(args), _levels(args)
    if args.seed < 0:
        raise LoadTestError("--seed cannot be negative")
    asyncio.run(wait_until_ready(target, args.wait_ready))
    print(f"{'clients':>8}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'not ok':>8}{'GPU busy':>10}", flush=True)
    results = []
    with GpuBusy() as gpus:
        for level in levels:
            with _Bar(level, hidden=args.no_progress) as bar:
                record = run_level(target, workload, level, args.seed, bar.tick)
            results.append(_result(level, record, gpus.between(record.begin_s, record.end_s)))
            _print(results[-1])
    result = ClosedLoopResult(
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        url=target.base_url,
        workload=workload.workload.name,
        seed=args.seed,
        warmup_s=args.warmup,
        levels=results,
    )
    save_result(result, args.output)
    print(f"written: {args.output}")
    return 1 if any(level.counts.ok < max(level.counts.sent, 1) for level in results) else 0


def _levels(args: argparse.Namespace) -> Sequence[Level]:
    try:
        counts = [int(part) for part in args.clients.split(",")]
    except ValueError as error:
        raise LoadTestError(f"--clients {args.clients!r}: expected numbers such as 1,32,256") from error
    if min(counts) < 1:
        raise LoadTestError(f"--clients {args.clients}: at least 1")
    return [
        Level(
            num_clients=count,
            num_processes=min(count, default_processes(count) if args.processes is None else args.processes),
            warmup_s=args.warmup,
            duration_s=args.duration,
            timeout_s=args.timeout,
        )
        for count in counts
    ]


def _result(level: Level, record: LevelRecord, gpu_busy: dict[str, float]) -> LevelResult:
    return LevelResult(
        num_clients=level.num_clients,
        num_processes=level.num_processes,
        duration_s=level.duration_s,
        counts=Counts(
            sent=record.outcomes.total(),
            retried=0,
            **{outcome.name.lower(): record.outcomes[outcome] for outcome in Outcome},
        ),
        requests_per_s=len(record.latency_s) / level.duration_s,
        source_chars_per_s=record.source_chars / level.duration_s,
        latency=summarise(record.latency_s),
        gpu_busy=gpu_busy,
        cpu_fraction=record.cpu_fraction,
    )


def _print(level: LevelResult) -> None:
    latency, counts = level.latency, level.counts
    p50, p99 = ("-", "-") if latency is None else (f"{latency.p50_s * 1e3:.1f}", f"{latency.p99_s * 1e3:.1f}")
    busy = " ".join(f"{share:.0%}" for share in level.gpu_busy.values()) or "-"
    print(
        f"{level.num_clients:>8}{level.requests_per_s:>12.4g}{p50:>10}{p99:>10}{counts.sent - counts.ok:>8}{busy:>10}",
        flush=True,
    )
    for outcome in Outcome:
        if outcome is not Outcome.OK and (count := getattr(counts, outcome.name.lower())):
            print(f"NOT OK: {count} x {outcome.meaning}")
    if not counts.sent:
        print(f"NOT OK: nothing was answered within {level.duration_s:g} s; choose a longer --duration")
    if level.cpu_fraction > _MAX_CPU_FRACTION:
        print(
            f"note: a client process used {level.cpu_fraction:.0%} of a core: the service may be able to do more "
            f"(--processes {level.num_processes} now)"
        )


class _Bar:
    """Seconds of a level on stderr; more than planned while processes start and last answers are awaited."""

    def __init__(self, level: Level, *, hidden: bool) -> None:
        self._total_s = level.warmup_s + level.duration_s
        self._started_s = time.monotonic()
        self._bar = tqdm(
            total=round(self._total_s, 1),
            desc=f"{level.num_clients} clients",
            unit="s",
            leave=False,
            file=sys.stderr,
            disable=hidden or not sys.stderr.isatty(),
        )

    def tick(self) -> None:
        self._bar.update(min(time.monotonic() - self._started_s, self._total_s) - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
