"""Plan replicas and GPUs for a load, and what a million characters then costs.

Reads pools of language pairs with their peak and mean load, takes the capacity of each GPU from measured profiles (or
estimates it from bytes and FLOPs, and says so), and finds the cheapest fleet to a proven gap: enough for the peak, one
replica may fail, minimum counts and quotas kept. `--paper` redoes the cost table of the paper with its assumptions
spelled out.

`--layout` decides which pairs share a pool: shared pools need fewer spare replicas and even peaks out, a pool of few pairs
touches fewer experts a decode step. It reads the demand of each pair and writes the pools for the next plan.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import PRECISIONS, ModelConfig

if TYPE_CHECKING:
    from app.cost.hardware import Offer
    from app.cost.plan import PlanRules
    from app.cost.profile import Profile

EXAMPLES = """  babelephant plan pools.yaml
  babelephant plan pools.yaml --gpu L4 --gpu L40S --quota L4=8 --slo 0.8
  babelephant plan pools.yaml --profile h200.json --spot --degraded 1.0
  babelephant plan pools.yaml --gpu L4 --zones 3 --degraded 1.0
  babelephant plan pools.yaml --json plan.json --plot plan.png
  babelephant plan --layout pairs.yaml --profile h200.json --experts experts.json --out pools.yaml
  babelephant plan --paper

pairs.yaml is written by `babelephant demand`, experts.json by `babelephant experts`. pools.yaml is a list of pools:
  - {name: en-de, peak_per_s: 120, mean_per_s: 60, source_chars: 110, source_tokens: 28, target_tokens: 30}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("pools", nargs="?", type=Path, metavar="POOLS", help="YAML list of pools, see the example")
    parser.add_argument("--paper", action="store_true", help="redo the paper's Table 4 and stop")
    parser.add_argument(
        "--layout", type=Path, metavar="PAIRS", help="decide which pairs of this YAML share a pool, and stop"
    )
    parser.add_argument(
        "--experts", type=Path, metavar="FILE", help="with --layout: experts that each pair uses, as measured"
    )
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE", help="with --layout: learnt lengths, for pairs without tokens"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --layout: write the pools here")
    parser.add_argument("--slo", type=float, default=1.0, metavar="S", help="p99 of a sentence in seconds; default 1")
    parser.add_argument(
        "--gpu", action="append", metavar="NAME", help="GPU to consider; may be repeated; default: all priced"
    )
    parser.add_argument("--quota", action="append", default=[], metavar="GPU=N", help="at most N of a GPU; may be repeated")
    parser.add_argument("--spot", action="store_true", help="consider spot prices too")
    parser.add_argument(
        "--degraded",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="of the peak, served after a replica is lost; default 0.8",
    )
    parser.add_argument(
        "--zones", type=int, default=1, metavar="N", help="spread replicas over N zones, one of which may be lost; default 1"
    )
    parser.add_argument(
        "--profile", action="append", default=[], type=Path, metavar="FILE", help="measured profile; may be repeated"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="model to estimate; default: the shape of NLLB-MoE-54B"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="w4a16", help="of the expert weights; default w4a16")
    parser.add_argument("--beam-size", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="price catalogue; default: the one that ships")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan for `babelephant deploy`")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write replicas and USD per hour by pool as PNG (matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, then print the table."""
    from app.cli import CommandError
    from app.cost.hardware import price_catalogue
    from app.cost.paper import paper_report
    from app.cost.plan import PlanRules, make_plan, read_pools, table
    from app.cost.profile import Profile

    if args.paper:
        print(paper_report())
        return 0
    if (args.pools is None) == (args.layout is None):
        raise CommandError("give a YAML file of pools, --layout with one of pairs, or --paper: `babelephant plan --help`")
    if args.layout is None and (args.experts or args.lengths or args.out):
        raise CommandError("--experts, --lengths and --out belong to --layout")
    catalogue = price_catalogue(args.prices)
    offers = [
        offer
        for offer in catalogue.offers
        if (args.spot or offer.purchase == "on_demand") and (not args.gpu or offer.gpu in args.gpu)
    ]
    if missing := sorted(set(args.gpu or ()) - {offer.gpu for offer in offers}):
        raise CommandError(
            f"no price for {', '.join(missing)}; the catalogue has {', '.join(sorted({o.gpu for o in catalogue.offers}))}"
        )
    try:
        pools = read_pools(args.pools) if args.pools else []
        measured = {profile.device: profile for profile in map(Profile.load, args.profile)}
    except OSError as error:
        raise CommandError(str(error)) from error
    estimated, skipped = _estimates(args, {offer.gpu for offer in offers} - measured.keys())
    rules = PlanRules(args.slo, args.degraded, _quotas(args.quota), args.zones)
    if not estimated and not measured:
        raise CommandError("the model runs on none of these GPUs: " + "; ".join(skipped))
    if args.layout:
        return _layout(args, offers, {**estimated, **measured}, rules)
    plan = make_plan(pools, offers, {**estimated, **measured}, rules, catalogue)
    print(table(plan))
    for reason in skipped:
        print(f"left out: {reason}")
    if args.json:
        from app.deployment import DeploymentPlan

        args.json.write_text(DeploymentPlan.from_plan(plan).model_dump_json(indent=1) + "\n")
        print(f"plan: {args.json}; the Serve config it implies: babelephant deploy --dry-run {args.json}")
    if args.plot:
        from app.cost.plan import plot

        plot(plan, args.plot)
        print(f"plot: {args.plot}")
    return 0


def _layout(args: argparse.Namespace, offers: Sequence[Offer], profiles: Mapping[str, Profile], rules: PlanRules) -> int:
    """Decide, print, write."""
    from app.cli import CommandError
    from app.cost.expert_usage import ExpertUsage
    from app.cost.layout import as_pools_file, make_layout, table
    from app.cost.lengths import PairLengths
    from app.cost.traffic import Traffic

    try:
        traffic = Traffic.read(args.layout)
        usage = ExpertUsage.load(args.experts) if args.experts else None
        lengths = PairLengths.load(args.lengths) if args.lengths else PairLengths()
    except OSError as error:
        raise CommandError(str(error)) from error
    layout = make_layout(traffic.with_tokens(lengths), offers, profiles, rules, usage)
    print(table(layout))
    if any(profiles[pool.offer.gpu].estimated for pool in layout.pools):
        print("capacities are estimated from bytes and FLOPs, not measured: give a --profile before ordering")
    if args.out:
        args.out.write_text(as_pools_file(layout))
        print(f"pools: {args.out}; the fleet for them: babelephant plan {args.out}")
    return 0


def _estimates(args: argparse.Namespace, gpus: set[str]) -> tuple[dict[str, Profile], list[str]]:
    """Roofline profiles of GPUs that were not measured, and why some have none."""
    from app.cost.hardware import devices
    from app.cost.profile import ProfileError, roofline_profile

    config, name = _model(args.checkpoint)
    known, found, skipped = devices(), {}, []
    for gpu in sorted(gpus):
        if gpu not in known:
            skipped.append(f"{gpu}: no peaks in hardware.yaml and no profile")
            continue
        try:
            found[gpu] = roofline_profile(config, name, args.precision, known[gpu], args.beam_size)
        except ProfileError as error:
            skipped.append(str(error))
    return found, skipped


def _model(checkpoint: Path | None) -> tuple[ModelConfig, str]:
    if checkpoint is None:
        shape = (resources.files("app.cost") / "data" / "nllb_moe_54b.json").read_text()
        return ModelConfig.from_dict(json.loads(shape)), "NLLB-MoE-54B"
    return ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text())), checkpoint.name


def _quotas(texts: list[str]) -> dict[str, int]:
    quotas = {}
    for text in texts:
        gpu, equals, count = text.partition("=")
        if not equals or not count.isdigit():
            raise ValueError(f"--quota {text!r}: write GPU=N, such as L4=8")
        quotas[gpu] = int(count)
    return quotas
