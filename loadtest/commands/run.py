"""Send one schedule and measure."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest import arrivals
from loadtest.arrivals import RateProfile, Schedule
from loadtest.commands import options
from loadtest.commands.progress import Progress
from loadtest.errors import LoadTestError
from loadtest.execution import Execution
from loadtest.report import render_report
from loadtest.results import RunResult, save_result, write_atomically
from loadtest.summary import RunContext
from loadtest.target import wait_until_ready

EXAMPLES = """\
  python -m loadtest run --rate 5 --duration 30
  python -m loadtest run --rate 20 --arrivals gamma --dispersion 8       bursts
  python -m loadtest run --shape ramp --start-rate 1 --rate 30 --duration 300
  python -m loadtest run --shape steps --steps 5,10,20,10 --duration 240
  python -m loadtest run --shape soak --rate 12 --duration 1800          after a gentle warm-up; shows drift
  python -m loadtest run --trace arrivals.csv --speed 2                  first column: seconds
  python -m loadtest run --rate 20 --slo-ms 500 --price-per-replica-hour 1.006

Exit status: 0 measured, 1 not a valid measurement (or, with --require-slo, a promise not shown), 2 bad input."""
_SOAK_WARMUP_SHARE = 0.05
_MAX_RANGES = 8  # printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_target(parser)
    group = parser.add_argument_group("when requests are sent (fixed before the run)")
    group.add_argument(
        "--rate", type=options.number, default=5.0, metavar="R", help="requests/s; ramp: at its end (default: 5)"
    )
    group.add_argument("--duration", type=options.number, default=30.0, metavar="S", help="measured seconds (default: 30)")
    group.add_argument(
        "--warmup", type=options.number, metavar="S", help="sent before, not measured (default: 0; soak: 5 %%)"
    )
    group.add_argument(
        "--arrivals", choices=("poisson", "constant", "gamma"), default="poisson", help="default: %(default)s"
    )
    group.add_argument(
        "--dispersion", type=options.number, metavar="D", help="gamma: variance over mean of counts (default: 4)"
    )
    group.add_argument("--shape", choices=("flat", "ramp", "steps", "soak"), default="flat", help="default: %(default)s")
    group.add_argument("--start-rate", type=options.number, default=0.0, metavar="R", help="ramp: at its start (default: 0)")
    group.add_argument("--steps", metavar="R,R,...", help="steps: rates of equally long stairs")
    group.add_argument("--trace", type=Path, metavar="CSV", help="replay these times instead")
    group.add_argument("--speed", type=options.number, default=1.0, help="trace: 2 replays twice as fast (default: 1)")
    group.add_argument("--schedule-csv", type=Path, metavar="FILE", help="write the intended times (for another tool)")
    group.add_argument("--dry-run", action="store_true", help="draw and describe everything, send nothing")
    options.add_promise(parser)
    group = parser.add_argument_group("outcome")
    group.add_argument("--require-slo", action="store_true", help="exit with 1 unless the SLO is shown to hold")
    options.add_client(parser)
    options.add_output(parser, "loadtest-run")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    context = _context(args)
    schedule = context.schedule
    if args.schedule_csv:
        rows = "".join(f"{time:.6f}\n" for time in schedule.times_s.tolist())
        write_atomically(args.schedule_csv, f"timestamp_s\n{rows}")
    print(
        f"{len(schedule.times_s)} requests ({schedule.arrivals}, seed {schedule.seed}) over {schedule.duration_s:g} s to "
        f"{context.url}, workload {context.workload.name}, SLO {context.slo}",
        file=sys.stderr,
    )
    if args.dry_run:
        return 0
    result = asyncio.run(_measure(args, context))
    save_result(result, args.output)
    write_atomically(options.html_path(args), render_report(result))
    print_run(result)
    print(f"written: {args.output}, {options.html_path(args)}")
    return 0 if result.valid and (not args.require_slo or result.slo_verdict == "met") else 1


def print_run(result: RunResult) -> None:
    """The result in a few lines."""
    counts, rates, latency, lag = result.counts, result.rates, result.latency, result.client.send_lag
    print(
        f"sent {counts.sent}: ok {counts.ok}, refused {counts.refused}, 4xx {counts.client_error}, lost {counts.lost} "
        f"(5xx {counts.server_error}, timeout {counts.timeout}, connection {counts.connection}, other {counts.malformed})"
    )
    print(
        f"offered {rates.offered_per_s:.4g}/s, completed {rates.completed_per_s:.4g}/s, goodput {rates.goodput_per_s:.4g}/s "
        f"({rates.good_fraction:.2%} good); SLO {result.slo}: {result.slo_verdict}"
    )
    if latency:
        print(
            f"latency ms: p50 {latency.p50_s * 1000:.1f}, p90 {latency.p90_s * 1000:.1f}, p95 {latency.p95_s * 1000:.1f}, "
            f"p99 {latency.p99_s * 1000:.1f}, p99.9 {latency.p99_9_s * 1000:.1f}, max {latency.max_s * 1000:.1f}"
        )
    print(f"characters/s: source {rates.source_chars_per_s:.4g}, target {rates.target_chars_per_s:.4g}")
    if result.p99_drift is not None:
        print(f"drift: p99 of the last third is {result.p99_drift:.2f} x that of the first")
    if result.cost:
        good, every = result.cost.usd_per_million_good_chars, result.cost.usd_per_million_chars
        shown = ["none" if value is None else f"{value:.4g}" for value in (good, every)]
        print(f"USD per million source characters: {shown[0]} within the SLO, {shown[1]} answered")
    if lag:
        print(f"client: send lag p99 {lag.p99_s * 1000:.2f} ms (limit {result.client.max_lag_s * 1000:g}), "
              f"max {lag.max_s * 1000:.2f} ms, CPU {result.client.cpu_fraction:.0%} of a core"
              f"{_busiest(result.client.num_processes)}")  # fmt: skip
    if counts.retried:
        print(f"{counts.retried} requests were sent once more after a connection error")
    if result.never_sent and not result.valid:  # else the verdict was certain before their turn came
        print(f"never sent: numbers {_ranges(result.never_sent)} of the schedule (from 0)")
    for reason in result.invalid_because:
        print(f"NOT VALID: {reason}")
    for warning in result.warnings:
        print(f"note: {warning}")


def _busiest(num_processes: int) -> str:
    return f" (the busiest of {num_processes} processes)" if num_processes > 1 else ""


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ranges[:_MAX_RANGES])
    rest = f" and {len(ranges) - _MAX_RANGES} more ranges (see the JSON file)" if len(ranges) > _MAX_RANGES else ""
    return shown + rest


def _context(args: argparse.Namespace) -> RunContext:
    target, workload = options.chosen_target(args), options.chosen_workload(args)
    slo, sender, price = options.chosen_slo(args, workload), options.chosen_sender(args), options.chosen_price(args)
    schedule = _schedule(args)
    return RunContext(
        url=target.base_url,
        label=args.label
        or f"{workload.workload.name}, {schedule.arrivals} {len(schedule.times_s) / schedule.duration_s:.3g}/s",
        workload=workload.workload,
        schedule=schedule,
        planned=workload.draw(len(schedule.times_s), args.seed),
        options=sender,
        slo=slo,
        confidence=args.confidence,
        max_lag_s=args.max_lag_ms / 1000,
        price=price,
    )


def _schedule(args: argparse.Namespace) -> Schedule:
    if args.dispersion is not None and args.arrivals != "gamma":
        raise LoadTestError(f"--dispersion belongs to --arrivals gamma, not {args.arrivals}")
    if args.trace is not None:
        schedule = arrivals.replay_trace(args.trace, speed=args.speed, warmup_s=args.warmup or 0.0)
    else:
        profile, warmup_s = _profile(args)
        _refuse_too_many(profile.expected_count, args.max_requests)  # before gigabytes of times are drawn
        dispersion = {"constant": 0.0, "poisson": 1.0, "gamma": 4.0 if args.dispersion is None else args.dispersion}[
            args.arrivals
        ]
        schedule = arrivals.draw_schedule(profile, dispersion=dispersion, seed=args.seed, warmup_s=warmup_s)
    _refuse_too_many(len(schedule.times_s), args.max_requests)
    return schedule


def _profile(args: argparse.Namespace) -> tuple[RateProfile, float]:
    if (args.steps is not None) != (args.shape == "steps"):
        raise LoadTestError("--shape steps and --steps 5,10,20 go together")
    if args.shape == "ramp":
        profile = arrivals.ramp(args.start_rate, args.rate, args.duration)
    elif args.shape == "steps":
        profile = arrivals.steps(_rates(args.steps), args.duration)
    else:
        profile = arrivals.flat(args.rate, args.duration)
    soak = args.shape == "soak"
    warmup_s = args.warmup if args.warmup is not None else (_SOAK_WARMUP_SHARE * args.duration if soak else 0.0)
    return arrivals.with_warmup(profile, warmup_s, gently=soak), warmup_s


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(options.number(part) for part in text.split(","))
    except ValueError as error:
        raise LoadTestError(f"--steps {text!r}: expected rates such as 5,10,20") from error


def _refuse_too_many(count: float, limit: int) -> None:
    if count > limit:
        raise LoadTestError(f"the schedule has {count:.0f} requests; raise --max-requests ({limit}) if you mean it")


async def _measure(args: argparse.Namespace, context: RunContext) -> RunResult:
    await wait_until_ready(options.chosen_target(args), args.wait_ready)
    progress = Progress(len(context.planned), "sending", hidden=args.no_progress)
    execution = Execution(context, [progress])
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        execution.stop()
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C does not wait for answers
        print("stopping: waiting for the answers under way", file=sys.stderr)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await execution.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        progress.close()
