"""Offline sweep of expert-FFN tiles: python -m kernels.tune --out DIR [--shapes paper 54b] [--precisions w4a16 w8a16 bf16].

Compiles every candidate ahead in a pool, then checks and times each (CUDA graphs, cold weights, zipf routing) in child
processes with a time limit, so that a candidate that hangs costs its own child only. Writes DIR/sweep.json (everything)
and DIR/expert_gemm.json (the choices, with their birth certificate: copy it to kernels/configs/<device>/).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kernels.cases import DECODE_TOKENS, ENCODE_TOKENS, FFN_SHAPES, PRECISIONS, FfnShape, Precision
from kernels.compile_ahead import compile_ahead
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.tune_candidates import MODES, candidates, variant_key

_TRIAL_TOKENS = {"pipelined": 1024}  # every other mode is tried at 64


def sizes_of(shape: FfnShape) -> tuple[int, ...]:
    """Token counts to tune for."""
    return (1, 64, 320, 1024, 4096) if shape.num_experts > 64 else DECODE_TOKENS + ENCODE_TOKENS


def compile_candidates(points: list[tuple[FfnShape, Precision, int]]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Compile every candidate of every point; programs per SM by variant key, and the list of variants that failed
    or spill."""
    variants = {
        variant_key(shape, precision, tiles): (shape, precision, tiles)
        for shape, precision, tokens in points
        for tiles in candidates(shape, precision, tokens)
    }
    owners, jobs = [], []
    for key, (shape, precision, tiles) in variants.items():
        for job in ffn_jobs(shape.d_model, shape.d_ff, shape.top_k, precision.bits, precision.group_size, tiles):
            owners.append(key)
            jobs.append(job)
    programs: dict[str, int] = {}
    troubles = []
    for key, result in zip(owners, compile_ahead(jobs, capability=90), strict=True):
        programs[key] = min(programs.get(key, 99), result.programs_per_sm)
        if result.error or result.spill_bytes > 64:
            troubles.append({"variant": key, **dataclasses.asdict(result)})
    return programs, troubles


def certificate(device: str) -> dict[str, str]:
    """Where and when a measurement was born."""
    import triton

    return {
        "gpu": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit_of(Path(__file__)),
    }


def commit_of(file: Path) -> str:
    """Short hash of the checkout that `file` is part of, `-dirty` behind it where tracked files have been changed since."""
    if not shutil.which("git"):
        return "unknown: git is not installed"
    try:
        # a copy that happens to lie below somebody's checkout is not of its commit
        for command in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--dirty", "--exclude=*"]):
            said = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError:
        return "not in a git checkout"
    return said.strip()


def trial(mode: str, programs_file: Path, out: Path) -> bool:
    """Whether a launch mode works here at all: four candidates at one size in a child of its own."""
    folder = out / f"trial_{mode}"
    folder.mkdir(exist_ok=True)
    point = FFN_SHAPES["paper"], PRECISIONS["w4a16"], (_TRIAL_TOKENS.get(mode, 64),)
    trouble = run_child(point, programs_file, folder, 25.0, f"{mode},trial")
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    works = not trouble and any(line["ok"] for line in lines)
    shown = [(line["key"], line.get("us"), line.get("error")) for line in lines]
    print(f"trial {mode}: {'works' if works else 'DROPPED'} {trouble} {shown}", flush=True)
    return works


def run_child(
    point: tuple[FfnShape, Precision, tuple[int, ...]], programs_file: Path, out: Path, limit_s: float, modes: str
) -> str:
    """Measure one (shape, precision) in a child process; returns what went wrong, or an empty string."""
    shape, precision, sizes = point
    command = [
        sys.executable,
        "-m",
        "kernels.tune_worker",
        shape.name,
        precision.name,
        modes,
        str(programs_file),
        str(out),
        str(limit_s),
        *map(str, sizes),
    ]
    try:
        done = subprocess.run(command, timeout=limit_s + 15, check=False)
    except subprocess.TimeoutExpired:
        return f"{shape.name}/{precision.name}/{modes}: killed after {limit_s + 15:.0f} s (a hang?)"
    return f"{shape.name}/{precision.name}/{modes}: exit {done.returncode}" if done.returncode else ""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the results")
    parser.add_argument("--shapes", nargs="+", default=list(FFN_SHAPES), choices=list(FFN_SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["w4a16", "w8a16", "bf16"], choices=list(PRECISIONS))
    parser.add_argument("--sizes", nargs="+", type=int, help="token counts (default: the shape's list)")
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=list(MODES), help="default: all that pass a short trial"
    )
    parser.add_argument("--limit-s", type=float, default=200.0, help="seconds for all measurements together")
    options = parser.parse_args()
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    shapes = [FFN_SHAPES[s] for s in options.shapes]
    precisions = [PRECISIONS[p] for p in options.precisions]
    points = [(s, p, t) for s in shapes for p in precisions for t in (options.sizes or sizes_of(s))]
    programs, troubles = compile_candidates(points)
    programs_file = options.out / "programs.json"
    programs_file.write_text(json.dumps({"programs_per_sm": programs, "troubles": troubles}, indent=1), encoding="utf-8")
    print(
        f"compiled {len(programs)} variants in {time.perf_counter() - started:.0f} s; {len(troubles)} failed or spill",
        flush=True,
    )
    modes = ["plain", *(m for m in options.modes if m != "plain" and trial(m, programs_file, options.out))]
    work = [(s, p) for p in precisions for s in shapes]
    for index, (s, p) in enumerate(work):
        left = options.limit_s - (time.perf_counter() - started)
        share = max(8.0, left / (len(work) - index))
        trouble = run_child((s, p, tuple(options.sizes or sizes_of(s))), programs_file, options.out, share, ",".join(modes))
        if trouble:
            print("TROUBLE", trouble, flush=True)
    summarize(options.out)
    return 0


def summarize(out: Path) -> None:
    """Merge the children's files, print the best of each point, write sweep.json and expert_gemm.json."""
    results = [
        json.loads(line)
        for file in sorted(out.glob("part_*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    (out / "sweep.json").write_text(json.dumps(results), encoding="utf-8")
    entries = []
    for point in sorted({(r["shape"], r["precision"], r["tokens"]) for r in results}):
        rows = [r for r in results if (r["shape"], r["precision"], r["tokens"]) == point]
        good = sorted((r for r in rows if r.get("us") and r["ok"]), key=lambda r: r["us"])
        anchor = min(
            (r["us"] for r in results if r["key"] == "grouped_mm" and (r["shape"], r["tokens"]) == (point[0], point[2])),
            default=0.0,
        )
        ours = [r for r in good if r["key"] != "grouped_mm"]
        bad = [r["key"] for r in rows if not r["ok"]]
        plain = next((r["us"] for r in ours if "plain" in r["key"]), 0.0)
        head = f"{point[0]:5} {point[1]:6} T={point[2]:<6} grouped_mm {anchor:7.1f}  plain {plain:7.1f}  "
        tail = f"  BAD {len(bad)}: {bad[0]}" if bad else ""
        print(head + " | ".join(f"{r['us']:.1f} {r['key']}" for r in ours[:3]) + tail, flush=True)
        if ours:
            shape, precision = FFN_SHAPES[point[0]], PRECISIONS[point[1]]
            key = {
                "bits": precision.bits,
                "group": precision.group_size,
                "d": shape.d_model,
                "f": shape.d_ff,
                "e": shape.num_experts,
            }
            entries.append(
                {"shape": key, "max_size": point[2] * shape.top_k, "choice": ours[0]["tiles"], "us": ours[0]["us"]}
            )
    device = next((r["device"] for r in results), "unknown")
    (out / "expert_gemm.json").write_text(
        json.dumps({"certificate": certificate(device), "entries": entries}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    raise SystemExit(main())
