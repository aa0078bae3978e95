"""Offline sweep of small-linear tiles: python -m kernels.linear_tune --out DIR [--limit-s 300] [--bits 16 8] [--int8-rows].

Compiles the candidates ahead in a pool, then checks and times them breadth first (every shape and size gets its next few
before any gets more), torch's GEMM among them. Writes DIR/linear_sweep.jsonl as it goes and DIR/small_linear.json (the
choices, with their birth certificate: copy it to kernels/configs/<device>/). `--summarize` only writes the choices again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from kernels.compile_ahead import compile_ahead
from kernels.linear_bench import LINEAR_LIMIT, LinearBed, LinearPoint, LinearShape, int8_rows_shapes, layer_shapes
from kernels.linear_candidates import candidates, int8_rows_candidates
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import int8_rows_jobs, linear_jobs
from kernels.tune import certificate

SIZES = (1, 16, 32, 64, 128, 320)
_ROUND = 6  # candidates of one point before the next point's turn
_SHARED = 232448


Point = tuple[LinearShape, int, int]  # shape, bits, rows
Plan = dict[Point, list[LinearTiles]]
Variant = tuple[LinearShape, int, LinearTiles]


def jobs_of(shape: LinearShape, bits: int, tiles: LinearTiles) -> list[Any]:
    """Compile jobs of one variant."""
    mode = 2 if shape.cache else 1 if shape.residual else 0
    if shape.int8_rows:
        return int8_rows_jobs(shape.n, shape.k, tiles, folded=shape.norm, relu=shape.relu, mode=mode, hopper=True)
    options = {"norm": shape.norm, "relu": shape.relu, "mode": mode, "hopper": True}
    return linear_jobs(shape.n, shape.k, tiles, int8=bits == 8, **options)  # type: ignore[arg-type]


def compile_variants(plan: Plan) -> set[Variant]:
    """Compile every variant of the plan on all cores; returns those that cannot run (error, shared memory)."""
    jobs: dict[str, Any] = {}
    owners: dict[str, set[Variant]] = {}
    for (shape, bits, _), wanted in plan.items():
        for tiles in wanted:
            for job in jobs_of(shape, bits, tiles):
                jobs[repr(job)] = job
                owners.setdefault(repr(job), set()).add((shape, bits, tiles))
    started = time.perf_counter()
    results = compile_ahead(jobs.values(), capability=90)
    broken = [key for key, result in zip(jobs, results, strict=True) if result.error or result.shared_bytes > _SHARED]
    print(f"compiled {len(jobs)} kernels in {time.perf_counter() - started:.0f} s; {len(broken)} cannot run", flush=True)
    return {owner for key in broken for owner in owners[key]}


def attempt(point: LinearPoint, tiles: LinearTiles) -> tuple[float, float | None]:
    """Error, and microseconds where it is small; a candidate that fails must not end the sweep."""
    try:
        error = point.error(tiles)
        return error, point.time_us(tiles) if error <= LINEAR_LIMIT else None
    except Exception as trouble:
        print(f"{tiles_key(tiles)}: {type(trouble).__name__}: {trouble}"[:300], flush=True)
        return math.inf, None


def measure(plan: Plan, broken: set[Variant], out: Path, limit_s: float) -> None:
    """Check and time candidates round by round until all are done or the time is over."""
    started = time.perf_counter()
    beds = {key: LinearBed.build(*key) for key in {(shape, bits) for shape, bits, _ in plan}}
    waiting = {p: [t for t in wanted if (p[0], p[1], t) not in broken] for p, wanted in plan.items()}
    print(f"{sum(map(len, waiting.values()))} candidates at {len(plan)} points", flush=True)
    with (out / "linear_sweep.jsonl").open("a", encoding="utf-8") as file:
        while any(waiting.values()):
            for (shape, bits, rows), queue in waiting.items():
                if not queue:
                    continue
                point = beds[shape, bits].point(rows)
                for tiles in queue[:_ROUND]:
                    if time.perf_counter() - started > limit_s:
                        print(f"out of time; {sum(map(len, waiting.values()))} candidates left out", flush=True)
                        return
                    error, us = attempt(point, tiles)
                    record = {"shape": dataclasses.asdict(shape), "bits": bits, "rows": rows, "error": error, "us": us}
                    record |= {"tiles": dataclasses.asdict(tiles), "device": torch.cuda.get_device_name()}
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                del queue[:_ROUND]


def summarize(out: Path) -> None:
    """Print the best of each point and write small_linear.json."""
    records = [json.loads(line) for line in (out / "linear_sweep.jsonl").read_text(encoding="utf-8").splitlines()]
    best: dict[tuple[Any, ...], dict[LinearTiles, float]] = {}
    wrong = 0
    for r in records:
        own = r["shape"]
        key = (own["n"], own["k"], r["bits"], int(own["norm"]), bool(own.get("int8_rows")), r["rows"])
        if r["us"] is None:
            wrong += 1
        else:
            best.setdefault(key, {})[LinearTiles(**r["tiles"])] = r["us"]
    entries = []
    for key, times in sorted(best.items()):
        n, k, bits, norm, int8_rows, rows = key
        ranked = sorted(times.items(), key=lambda item: item[1])
        library = next((us for tiles, us in ranked if tiles.library), None)
        kind = f"bits={bits:<2}" if not int8_rows else "int8 rows"
        head = f"{k:5}->{n:<5} {kind} norm={norm} R={rows:<4} library {f'{library:6.2f}' if library else '     -'}  "
        print(head + " | ".join(f"{us:.2f} {tiles_key(tiles)}" for tiles, us in ranked[:3]), flush=True)
        shape = {"n": n, "k": k, "bits": bits, "norm": norm, "fixed": 0}
        if int8_rows:
            shape = {"n": n, "k": k, "int8_rows": 1}
        entries.append({"shape": shape, "max_size": rows, "choice": choice_of(ranked[0][0]), "us": ranked[0][1]})
    entries += fixed_entries(best)
    device = records[0]["device"] if records else "unknown"
    print(f"{len(records)} measured, {wrong} wrong", flush=True)
    report = {"certificate": certificate(device), "entries": entries}
    (out / "small_linear.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def fixed_entries(best: dict[tuple[Any, ...], dict[LinearTiles, float]]) -> list[dict[str, Any]]:
    """For each shape the tiles with the least product of times over all sizes: one choice for every number of rows."""
    entries = []
    for n, k, bits, norm in sorted({key[:4] for key in best if not key[4]}):  # int8 rows have the same bits in any tiles
        tables = [times for key, times in best.items() if key[:5] == (n, k, bits, norm, False)]
        everywhere = [t for t in tables[0] if not t.library and all(t in table for table in tables)]
        if everywhere:
            mean = {t: math.exp(sum(math.log(table[t]) for table in tables) / len(tables)) for t in everywhere}
            chosen = min(everywhere, key=mean.__getitem__)
            shape = {"n": n, "k": k, "bits": bits, "norm": norm, "fixed": 1}
            entries.append({"shape": shape, "max_size": 0, "choice": choice_of(chosen), "us": mean[chosen]})
            print(
                f"{k:5}->{n:<5} bits={bits:<2} norm={norm} fixed: {tiles_key(chosen)} (mean {mean[chosen]:.2f} us)",
                flush=True,
            )
    return entries


def choice_of(tiles: LinearTiles) -> dict[str, int | bool]:
    """What a configs file holds."""
    return {"library": True} if tiles.library else dataclasses.asdict(tiles)


def tiles_key(tiles: LinearTiles) -> str:
    """Compact name."""
    if tiles.library:
        return "library"
    if tiles.no_dot:
        return f"n{tiles.bn} r{tiles.br} w{tiles.warps}" + (" overlap" if tiles.overlap else "")
    flags = {"statistics": not tiles.fuse_norm, "gram": tiles.gram, "prefetch": tiles.prefetch, "overlap": tiles.overlap}
    flags |= {"specialized": tiles.specialized}
    sizes = f"n{tiles.bn} k{tiles.bk} r{tiles.br} x{tiles.split} w{tiles.warps} s{tiles.stages}"
    return " ".join([sizes, *(flag for flag, on in flags.items() if on)])


def sweep_plan(options: argparse.Namespace) -> Plan:
    """What to time at which points. torch has no GEMM over int8 weights, Hopper's own kernel none of 16-bit rows by them."""
    if options.int8_rows:
        points = [(shape, 8, rows) for rows in options.sizes for d in options.d for shape in int8_rows_shapes(d)]
        return {point: int8_rows_candidates(point[0], point[2])[: options.candidates] for point in points}
    points = [(s, b, r) for b in options.bits for r in options.sizes for d in options.d for s in layer_shapes(d)]
    return {
        p: [t for t in candidates(p[0], p[2], overlap=options.overlap) if p[1] == 16 or not (t.library or t.specialized)][
            : options.candidates
        ]
        for p in points
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the results")
    parser.add_argument("--d", nargs="+", type=int, default=[1024, 2048], help="d_model of the layers to tune")
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 8], choices=[16, 8])
    parser.add_argument(
        "--int8-rows", action="store_true", help="maps behind norms with int8 rows and weights, nothing else"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="numbers of rows")
    parser.add_argument("--overlap", action="store_true", help="launches may overlap the kernel before them: see tiles.py")
    parser.add_argument("--candidates", type=int, default=36, help="at most so many a point")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for all measurements (compiling comes on top)")
    parser.add_argument("--summarize", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.summarize:
        plan = sweep_plan(options)
        measure(plan, compile_variants(plan), options.out, options.limit_s)
    summarize(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
