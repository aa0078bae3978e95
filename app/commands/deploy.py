"""Show the Serve config that a plan implies, and what it would change.

Takes the replica counts and prices of a plan (`babelephant plan ... --json FILE`) into a Serve YAML, checks the result
with Serve's own schema, unknown keys refused, and prints it with a diff against the current config. Nothing is applied:
`serve deploy` of Ray does that with the file that --output writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from app.settings import resolve_checkpoint

EXAMPLES = """  babelephant deploy --dry-run plan.json
  babelephant deploy --dry-run plan.json --config my.yaml --output planned.yaml
  babelephant deploy --dry-run plan.json --current last-deployed.yaml"""

_DEFAULT_CONFIG = "cluster_configs/serve/production.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan file")
    parser.add_argument("--dry-run", action="store_true", help="required: this command never touches a cluster")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"Serve YAML to start from (default: {_DEFAULT_CONFIG})")
    parser.add_argument(
        "--current", type=Path, metavar="FILE", help="what runs now, to compare with (default: the --config file)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the YAML there")
    parser.add_argument(
        "--keep-minimum", action="store_true", help="set max_replicas only, for a fleet that an autoscaling policy moves"
    )


def run(args: argparse.Namespace) -> int:
    """Print summary, YAML and diff."""
    from app.cli import CommandError
    from app.deployment import DeploymentPlan, as_yaml, difference, planned_config, summary
    from app.serve_config import check_serve_config, read_yaml

    if not args.dry_run:
        raise CommandError("add --dry-run; to apply, write the file with --output FILE and run Ray's `serve deploy FILE`")
    plan = DeploymentPlan.read(args.plan)
    config_path = args.config or resolve_checkpoint(_DEFAULT_CONFIG)
    planned = planned_config(read_yaml(config_path), plan, keep_minimum=args.keep_minimum)
    current_path = args.current or config_path
    current = read_yaml(current_path)
    check_serve_config(current, str(current_path))
    text = as_yaml(planned)
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    print("\n".join(f"# {line}" for line in summary(plan)))
    print(text)
    print(difference(current, planned, str(current_path)) or f"# {current_path} already says this")
    return 0
