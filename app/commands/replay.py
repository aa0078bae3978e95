"""Replay a traffic trace against the scaling policy: its cost and its share in time, beside those of other policies.

The trace is a CSV of one's own (`time,requests`, equal windows) or one that ships: m-large (14 days of a large service,
bursty) or taxi (8 weeks, smooth). The first part is for tuning, the rest is judged, beside a plan that knew everything
(the clairvoyant).
"""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """  babelephant replay m-large --seed 1
  babelephant replay traffic.csv --tune-days 7 --startup 120 --gpu L4 --goal 0.995
  babelephant replay m-large --queue bounded --baselines

Replay works in seconds: a replica serves a tenth of the mean rate unless --capacity says more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trace", metavar="TRACE", help="CSV file, m-large or taxi")
    parser.add_argument(
        "--startup", type=int, default=300, metavar="S", help="from order to serving; default 300 (whole tens)"
    )
    parser.add_argument(
        "--capacity", type=float, metavar="R", help="requests/s of a replica; default: a tenth of the mean rate"
    )
    parser.add_argument(
        "--queue", choices=("fifo", "bounded"), default="fifo", help="keep late work, or refuse it; default fifo"
    )
    parser.add_argument(
        "--goal", type=float, default=0.99, metavar="SHARE", help="share that waits at most 1 s; default 0.99"
    )
    parser.add_argument("--tune-days", type=int, metavar="N", help="days to tune on; default: half of the trace")
    parser.add_argument("--gpu", default="L4", metavar="NAME", help="GPU whose on-demand price is billed; default L4")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals; default 0")
    parser.add_argument("--baselines", action="store_true", help="also tune and judge other policies (minutes)")
    parser.add_argument(
        "--service-time",
        type=float,
        default=0.5,
        metavar="S",
        help="mean seconds a request is in service, which Ray Serve's own rule counts (with --baselines); default 0.5",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write load and replicas as PNG (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Tune, judge, print."""
    from app.cli import CommandError
    from app.cost.experiment import Experiment, load_trace, plot, run_experiment
    from app.cost.hardware import price_catalogue

    try:
        trace = load_trace(args.trace)
    except OSError as error:
        raise CommandError(f"{error}; give a CSV file, m-large or taxi") from error
    days = trace.duration_s // 86_400
    tune_days = args.tune_days if args.tune_days is not None else days // 2
    if not 1 <= tune_days < days:
        raise CommandError(
            f"--tune-days {tune_days}: the trace has {days} whole days; leave at least one to judge and one to tune on"
        )
    offer = price_catalogue().offer(args.gpu)
    experiment = Experiment(
        trace, args.startup, args.capacity, args.queue, args.goal, tune_days, args.seed, args.service_time
    )
    report = run_experiment(experiment, offer, baselines=args.baselines)
    print(report.text)
    if args.plot:
        plot(report, args.plot)
        print(f"plot: {args.plot}")
    return 0
