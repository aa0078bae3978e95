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
from kernels.expert_gemm.tiles import FfnTiles

MODES = ("plain", "static", "dynamic")

# (bn1, bn2, join, warps, stages); every width comes early, so that a sweep that runs out of time has seen each of them
_DECODE = [
    (64, 64, 2, 4, 3),
    (128, 64, 2, 4, 3),
    (128, 128, 1, 4, 3),
    (64, 64, 4, 4, 3),
    (64, 64, 2, 4, 4),
    (64, 64, 1, 4, 3),
    (128, 64, 1, 4, 3),
    (128, 128, 2, 8, 3),
]
_DECODE_BF16 = [(128, 128, 1, 4, 3), (128, 128, 1, 4, 4), (128, 128, 2, 4, 3), (64, 64, 2, 4, 3), (64, 64, 2, 4, 4)]
# (block_tokens, bn1, bn2, join, warps, stages)
_ENCODE = [
    (64, 256, 256, 2, 16, 3),
    (64, 128, 128, 2, 8, 2),
    (128, 128, 128, 2, 8, 2),
    (32, 128, 128, 2, 4, 3),
    (128, 256, 256, 2, 16, 2),
    (32, 64, 64, 2, 4, 3),
    (64, 256, 256, 2, 8, 3),
    (32, 128, 128, 2, 8, 3),
    (64, 128, 128, 1, 8, 3),
    (64, 128, 128, 4, 8, 2),
    (32, 256, 256, 2, 16, 3),
    (64, 256, 256, 1, 16, 3),
    (64, 256, 256, 4, 16, 2),
    (128, 256, 256, 4, 16, 2),
    (64, 256, 256, 1, 8, 3),
]
_ENCODE_BF16 = [
    (32, 128, 128, 1, 4, 3),
    (64, 128, 128, 1, 8, 3),
    (64, 128, 128, 1, 4, 4),
    (128, 128, 128, 1, 8, 3),
    (128, 128, 128, 1, 8, 4),
    (64, 256, 256, 1, 8, 3),
    (128, 256, 256, 1, 8, 3),
]


def candidates(shape: FfnShape, precision: Precision, num_tokens: int) -> list[FfnTiles]:
    """Tiles worth timing for this size, breadth first: every tile in the likely launch mode before any in another."""
    mean = num_tokens * shape.top_k / shape.num_experts
    found: list[FfnTiles] = []
    if mean <= 40:
        splits = (4, 8) if num_tokens <= 4 else (2, 4) if num_tokens <= 16 else (1, 2)
        for bn1, bn2, join, warps, stages in _DECODE_BF16 if precision.bits == 16 else _DECODE:
            base = FfnTiles(16, bn1, bn2, join, warps, stages)
            found.append(base)
            for split in splits if bn2 == 128 or num_tokens < 320 else (1,):
                for prefetch, dynamic in ((True, False), (False, True)):
                    found.append(dataclasses.replace(base, fused=True, split=split, prefetch=prefetch, dynamic=dynamic))
        found.append(dataclasses.replace(found[0], fused=True, split=splits[0]))
    if mean >= 6:
        for block, bn1, bn2, join, warps, stages in _ENCODE_BF16 if precision.bits == 16 else _ENCODE:
            if block <= 2 * mean + 16 and (block >= 64 or mean < 100):
                base = FfnTiles(block, bn1, bn2, join, warps, stages)
                found.append(base)
                found.append(dataclasses.replace(base, fused=True, dynamic=True))
    if precision.group_size:
        found = [t for t in found if t.join in (2, precision.group_size // 32)]
    likely = ("static", "dynamic", "plain") if num_tokens <= 4 else ("plain", "dynamic", "static")
    return sorted(found, key=lambda t: likely.index(mode_of(t)))


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


def variant_key(shape: FfnShape, precision: Precision, tiles: FfnTiles) -> str:
    """Name of one compiled variant."""
    return f"{shape.name}/{precision.name}/{tiles_key(tiles)}"


def mode_of(tiles: FfnTiles) -> str:
    """plain (two launches), static (fused, cooperative) or dynamic (fused, tickets)."""
    return "plain" if not tiles.fused else "dynamic" if tiles.dynamic else "static"


def tiles_key(tiles: FfnTiles) -> str:
    """Compact name of a tile choice."""
    mode = (
        f"fused split{tiles.split}{' prefetch' if tiles.prefetch else ''}{' dynamic' if tiles.dynamic else ''}"
        if tiles.fused
        else "plain"
    )
    return f"t{tiles.block_tokens} n{tiles.bn1}/{tiles.bn2} j{tiles.join} w{tiles.warps} s{tiles.stages} {mode}"


def certificate(device: str) -> dict[str, str]:
    """Where and when a measurement was born."""
    import triton

    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or "before first commit",
    }


def trial(mode: str, programs_file: Path, out: Path) -> bool:
    """Whether a launch mode works here at all: four candidates at 64 tokens in a child of its own."""
    folder = out / f"trial_{mode}"
    folder.mkdir(exist_ok=True)
    trouble = run_child((FFN_SHAPES["paper"], PRECISIONS["w4a16"], (64,)), programs_file, folder, 25.0, f"{mode},trial")
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
