"""Find the largest rate at which the SLO is shown to hold."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import signal
import sys
import time

from loadtest import arrivals
from loadtest.commands import options
from loadtest.commands.progress import Progress
from loadtest.commands.run import print_run
from loadtest.errors import LoadTestError
from loadtest.execution import Execution, VerdictDetector
from loadtest.knee import KneeOptions, KneeSearch, Purpose
from loadtest.report import render_report
from loadtest.results import KneeResult, Trial, save_result, write_atomically
from loadtest.sender import SenderOptions
from loadtest.summary import RunContext
from loadtest.target import wait_until_ready

EXAMPLES = """\
  python -m loadtest knee --workload single --low 2 --high 100
  python -m loadtest knee --slo-ms 500 --percentile 95 --price-per-replica-hour 1.006
  python -m loadtest knee --sweep 5 --trial-duration 60        5 more rates on each side of the knee, for the curve

Each trial sends Poisson arrivals until its counts decide about the SLO: a miss ends it at once, a pass at one of up to four
looks (each of them with a quarter of the error that --confidence allows). A trial that stays undecided counts as not shown.
The result is a rate that was shown to hold, never one that was interpolated.
Exit status: 0 knee found, 1 none found or not finished, 2 bad input."""
_NUM_LOOKS = 4  # the last comes after 8 times the first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_target(parser)
    group = parser.add_argument_group("the search")
    group.add_argument("--low", type=options.number, default=1.0, metavar="R", help="first rate, requests/s (default: 1)")
    group.add_argument("--high", type=options.number, default=1000.0, metavar="R", help="never beyond (default: 1000)")
    group.add_argument("--precision", type=options.number, default=0.05, help="width of the bracket (default: 0.05)")
    group.add_argument("--max-trials", type=int, default=14, metavar="N", help="default: 14")
    group.add_argument("--trial-duration", type=options.number, default=20.0, metavar="S", help="at least (default: 20)")
    group.add_argument("--max-trial-duration", type=options.number, default=600.0, metavar="S", help="default: 600")
    group.add_argument(
        "--max-minutes", type=options.number, default=60.0, metavar="M", help="start no trial after (default: 60)"
    )
    group.add_argument("--trial-warmup", type=options.number, default=2.0, metavar="S", help="not measured (default: 2)")
    group.add_argument("--pause", type=options.number, default=1.0, metavar="S", help="between trials (default: 1)")
    group.add_argument("--sweep", type=int, default=0, metavar="N", help="points on each side of the knee (default: 0)")
    options.add_promise(parser)
    options.add_client(parser)
    options.add_output(parser, "loadtest-knee")


def run(args: argparse.Namespace) -> int:
    """Search, print, write."""
    runner = TrialRunner(args)
    chosen = KneeOptions(args.low, args.high, args.precision, args.max_trials, args.sweep)
    search = KneeSearch(chosen, runner.run_trial)
    asyncio.run(_search(args, runner, search))
    result = KneeResult(
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        label=args.label or f"knee of {runner.workload.workload.name}",
        slo=runner.slo,
        confidence=args.confidence,
        knee_per_s=search.passes_per_s,
        fails_at_per_s=search.fails_per_s,
        finished=search.finished,
        trials=search.trials,
    )
    save_result(result, args.output)
    write_atomically(options.html_path(args), render_report(result))
    _print(result)
    print(f"written: {args.output}, {options.html_path(args)}")
    return 0 if search.completed and result.knee_per_s is not None else 1


class TrialRunner:
    """Runs one trial after another against the target of the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.workload = options.chosen_workload(args)
        self.slo = options.chosen_slo(args, self.workload)
        self._args = args
        self._target = options.chosen_target(args)
        self._sender: SenderOptions = options.chosen_sender(args)
        self._price = options.chosen_price(args)
        self._confidence = 1 - (1 - args.confidence) / _NUM_LOOKS
        self._needed = self.slo.min_requests(self._confidence)
        self._started_at_s = time.monotonic()
        self._execution: Execution | None = None
        self._interrupted = False
        if args.trial_duration <= 0 or args.trial_warmup < 0 or args.pause < 0:
            raise LoadTestError("--trial-duration must be above 0; --trial-warmup and --pause cannot be negative")
        self._first_look_s(args.low)

    def interrupt(self) -> None:
        """End the trial under way and the search."""
        self._interrupted = True
        if self._execution:
            self._execution.stop()

    async def run_trial(self, rate_per_s: float, number: int, purpose: Purpose) -> Trial:
        """One trial; LoadTestError when interrupted or out of time."""
        if time.monotonic() - self._started_at_s > self._args.max_minutes * 60:
            raise LoadTestError(f"out of time after {self._args.max_minutes:g} minutes (--max-minutes)")
        if number:
            await asyncio.sleep(self._args.pause)
        measured_s = self._looks_s(rate_per_s)[-1] if purpose == "search" else float(self._args.trial_duration)
        context = self._context(rate_per_s, measured_s, self._args.seed + number)
        progress = Progress(len(context.planned), f"{rate_per_s:.4g}/s", hidden=self._args.no_progress)
        detector = self._detector(rate_per_s) if purpose == "search" else None
        self._execution = Execution(context, [progress], detector=detector)
        try:
            run = await self._execution.run()
        finally:
            progress.close()
        if self._interrupted:
            raise LoadTestError("interrupted")
        p99 = f"{run.latency.p99_s * 1000:.1f} ms" if run.latency else "none"
        print(
            f"  {rate_per_s:8.4g}/s  {run.counts.sent:6d} requests  {run.rates.good_fraction:8.3%} good  p99 {p99:>12}  "
            f"{run.slo_verdict}{'' if run.valid else '  NOT VALID: ' + run.invalid_because[0]}",
            file=sys.stderr,
        )
        stopped_early = self._execution.decided_early
        return Trial(rate_per_s=rate_per_s, purpose=purpose, verdict=run.slo_verdict, stopped_early=stopped_early, run=run)

    def _first_look_s(self, rate_per_s: float) -> float:
        """Measured seconds after which a trial without a single violation can show the SLO."""
        needed_s = 1.2 * self._needed / rate_per_s  # a Poisson count falls short of its mean half of the time
        if needed_s > self._args.max_trial_duration:
            raise LoadTestError(
                f"showing {self.slo} takes {self._needed} requests, {needed_s:.0f} s at {rate_per_s:g}/s: raise --low or "
                f"--max-trial-duration ({self._args.max_trial_duration:g}), or lower --percentile or --confidence"
            )
        return max(float(self._args.trial_duration), needed_s)

    def _looks_s(self, rate_per_s: float) -> list[float]:
        """Measured seconds of the looks: doubling, the last at the longest duration allowed if that comes first."""
        first = self._first_look_s(rate_per_s)
        longest = max(first, float(self._args.max_trial_duration))
        return sorted({min(first * 2**k, longest) for k in range(_NUM_LOOKS)})

    def _detector(self, rate_per_s: float) -> VerdictDetector:
        warmup_s = self._args.trial_warmup
        looks_s = [warmup_s + look_s for look_s in self._looks_s(rate_per_s)]
        return VerdictDetector(self.slo, self._confidence, warmup_s, looks_s)

    def _context(self, rate_per_s: float, measured_s: float, seed: int) -> RunContext:
        warmup_s = self._args.trial_warmup
        profile = arrivals.with_warmup(arrivals.flat(rate_per_s, measured_s), warmup_s, gently=False)
        if profile.expected_count > self._args.max_requests:
            raise LoadTestError(
                f"a trial at {rate_per_s:g}/s has {profile.expected_count:.0f} requests; raise --max-requests"
            )
        schedule = arrivals.draw_schedule(profile, dispersion=1.0, seed=seed, warmup_s=warmup_s)
        return RunContext(
            url=self._target.base_url,
            label=f"{rate_per_s:.4g}/s",
            workload=self.workload.workload,
            schedule=schedule,
            planned=self.workload.draw(len(schedule.times_s), seed),
            options=self._sender,
            slo=self.slo,
            confidence=self._confidence,
            max_lag_s=self._args.max_lag_ms / 1000,
            price=self._price,
        )


async def _search(args: argparse.Namespace, runner: TrialRunner, search: KneeSearch) -> None:
    await wait_until_ready(options.chosen_target(args), args.wait_ready)
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        runner.interrupt()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        await search.run()
    except LoadTestError as error:
        search.finished = str(error)  # what was measured so far is still written
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _print(result: KneeResult) -> None:
    if result.best:
        print(f"the run at the knee, {result.best.label}:")
        print_run(result.best)
    knee = "none" if result.knee_per_s is None else f"{result.knee_per_s:.4g} requests/s"
    beyond = "" if result.fails_at_per_s is None else f", not at {result.fails_at_per_s:.4g}"
    print(f"knee for {result.slo}: {knee}{beyond} ({result.finished})")
