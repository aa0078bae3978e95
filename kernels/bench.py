"""Kernel benchmark: python -m kernels.bench [--ops route ...] [--quick] [--out results.json] [--plot roofline.png].

Every figure is the median of CUDA-graph replays in which each call has its own inputs (and weights too large for L2 where
weights matter). An op is checked against its plain-torch reference first; a failed check is reported and its time is not.
floor = 2 us a launch that must exist + max(bytes really touched / measured read bandwidth, FLOPs / measured matmul rate).
Prints a table under the card, its measured ceilings, date, commit, versions and command; --out writes all of it as JSON,
--plot the roofline (needs matplotlib). --rows results.json prints and plots an earlier run again instead of measuring: no
GPU needed. Exit 1 when a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kernels import attention_bench, bench_ops, head_bench, linear_bench
from kernels.bench_plot import plot_roofline
from kernels.bench_rows import Machine, Report, Row, read_report
from kernels.read_strips import read_strips
from kernels.testing import graph_time_us
from kernels.tune import certificate

OPS: dict[str, Callable[[Machine, bool], Iterator[Row]]] = {
    "expert_gemm": bench_ops.expert_gemm_rows,
    "table1": bench_ops.table1_rows,
    "route": bench_ops.route_rows,
    "add_layernorm": bench_ops.add_layernorm_rows,
    "decode_self": attention_bench.decode_self_rows,
    "decode_cross": attention_bench.decode_cross_rows,
    "encoder_attention": attention_bench.encoder_rows,
    "small_linear": linear_bench.small_linear_rows,
    "embed": linear_bench.embed_rows,
    "head_topk": head_bench.head_topk_rows,
    "attention_tiles": attention_bench.tile_rows,
}
SWEEPS = ("attention_tiles",)  # tile candidates beside the default: only when asked for


def measure_machine() -> Machine:
    """Read bandwidth (4 GiB by torch.sum or by `read_strips`, whichever is faster) and bf16 matmul rate (8192^3, random) of
    this very GPU."""
    big = torch.ones(1 << 31, dtype=torch.bfloat16, device="cuda")
    words = big.view(torch.int32)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    readers: list[Callable[[], object]] = [lambda: torch.sum(big, dtype=torch.float32), lambda: read_strips(words)]
    read_us = min(graph_time_us([reader], replays=7) for reader in readers)
    matmul_us = graph_time_us([lambda: a @ b], replays=9)
    return Machine(torch.cuda.get_device_name(), big.numel() * 2 / read_us * 1e6, 2 * 8192**3 / matmul_us * 1e6)


def format_head(machine: Machine, certificate: dict[str, str]) -> str:
    """The head of the table: the two ceilings, and where the figures come from."""
    born = {"command": "command not kept"} | certificate
    return (
        f"{machine.name}: read {machine.bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {machine.flops_per_s / 1e12:.0f} TFLOP/s\n"
        f"{born['date']}, commit {born['commit']}, torch {born['torch']}, triton {born['triton']}: {born['command']}"
    )


def format_row(row: Row, machine: Machine) -> str:
    """One line of the table."""
    if not row.ok:
        return f"{row.op:14} {row.case:44} CHECK FAILED: error {row.error:.2e} (limit {row.limit:.0e})"
    rate = row.bytes_touched / row.us * 1e-3
    anchors = "  ".join(f"{name} {us:.1f} us ({us / row.us:.2f}x)" for name, us in row.anchors_us.items())
    share = row.floor_us(machine) / row.us
    return f"{row.op:14} {row.case:44} {row.us:9.2f} us {rate:7.0f} GB/s {share:6.1%} of floor  {anchors}"


def measure(ops: list[str], quick: bool, command: str) -> Report:
    """Ceilings of this GPU and the rows of these ops, each printed as it comes."""
    if not torch.cuda.is_available():
        raise SystemExit("kernels.bench needs a CUDA GPU; on a CPU run `pytest tests/kernels`, or plot a report with --rows")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    machine = measure_machine()
    born = {"command": command} | certificate(machine.name)
    print(format_head(machine, born), flush=True)
    rows = []
    for op in ops:
        for row in OPS[op](machine, quick):
            rows.append(row)
            print(format_row(row, machine), flush=True)
    return Report(born, machine, rows)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit 1 when a check failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops",
        nargs="+",
        metavar="OP",
        default=[op for op in OPS if op not in SWEEPS],
        choices=list(OPS),
        help=f"default: all but the sweep {' '.join(SWEEPS)}; of {' '.join(OPS)}",
    )
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--plot", type=Path, help="image file for the roofline")
    parser.add_argument("--rows", type=Path, help="JSON file of an earlier --out: measure nothing")
    parser.add_argument("--quick", action="store_true", help="the must-show sizes only")
    options = parser.parse_args(arguments)
    if options.rows and options.out:
        parser.error("--rows measures nothing that --out could write: leave one of them out")
    if options.rows:
        try:
            report = read_report(json.loads(options.rows.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            parser.error(f"--rows {options.rows}: {error}")
        head = format_head(report.machine, report.certificate)
        print(head, *(format_row(row, report.machine) for row in report.rows), sep="\n")
    else:
        report = measure(options.ops, options.quick, shlex.join(["python", "-m", "kernels.bench", *arguments]))
    if options.out:
        options.out.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    if options.plot:
        plot_roofline(report, options.plot)
    return 0 if all(row.ok for row in report.rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
