"""Offline sweep of `head_topk` tiles: python -m kernels.head_tune --out DIR [--rows 1 320] [--bits 16 8 8x8] [--limit-s S].
8x8 is an int8 head with int8 rows.

Compiles every candidate ahead in a pool, then checks and times them breadth first: the first candidate of every size, then
the second, until the time is over. Writes DIR/head_sweep.jsonl as it goes and DIR/head_topk.json at the end (the choices,
with their birth certificate: copy it to kernels/configs/<device>/).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from kernels.compile_ahead import compile_ahead
from kernels.head_bench import HEAD_ROWS, HEADS, HeadBed, HeadPoint
from kernels.head_topk.jobs import head_jobs
from kernels.head_topk.tiles import HeadTiles, default_tiles
from kernels.tune import certificate

# block_vocab, block_rows, extra_rows, block_features, warps, stages; likely ones first
_FEW_ROWS = (
    (64, 0, 64, 4, 4),
    (128, 0, 64, 4, 4),
    (64, 0, 128, 4, 3),
    (64, 0, 64, 4, 6),
    (128, 0, 128, 4, 3),
    (128, 0, 64, 4, 3),
    (64, 0, 128, 4, 4),
    (128, 0, 128, 8, 3),
    (256, 0, 64, 8, 3),
    (32, 0, 128, 2, 4),
)
_SOME_ROWS = (
    (128, 0, 64, 4, 4),
    (128, 0, 64, 4, 3),
    (64, 0, 64, 4, 4),
    (256, 0, 64, 8, 3),
    (128, 0, 64, 8, 4),
    (128, 0, 128, 8, 3),
    (256, 0, 64, 8, 4),
    (64, 0, 128, 4, 3),
)
_MANY_ROWS = (
    (256, 128, 32, 64, 8, 4),
    (128, 128, 0, 64, 8, 3),
    (128, 128, 32, 64, 8, 3),
    (256, 128, 0, 64, 8, 4),
    (128, 128, 32, 64, 4, 3),
    (128, 256, 64, 64, 8, 4),
    (128, 64, 0, 64, 4, 4),
    (128, 128, 0, 64, 4, 3),
    (256, 64, 16, 64, 8, 4),
    (256, 64, 0, 64, 8, 3),
    (256, 128, 32, 64, 8, 3),
    (64, 256, 64, 64, 8, 3),
    (256, 64, 0, 64, 8, 4),
    (128, 128, 0, 64, 8, 4),
)
_BITS = {"16": (16, 16), "8": (8, 16), "8x8": (8, 8)}  # of weights and of rows
# block_vocab, block_rows, extra_rows, block_features, stages of the kernel for Hopper; elsewhere it fails to compile
_SPECIALIZED = (
    (128, 256, 64, 64, 4),
    (256, 128, 0, 64, 4),
    (128, 256, 0, 64, 4),
    (256, 128, 64, 64, 4),
    (128, 128, 0, 128, 3),
    (128, 128, 64, 64, 5),
)
_ONLINE = ((256, 64, 64, 6), (128, 0, 64, 8), (128, 64, 64, 7), (256, 0, 64, 8))  # block_rows, extra_rows, features, stages


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Point:
    """One size of one head: V, D, bits of the weight, bits of the rows (8 or 16), R."""

    v: int
    d: int
    bits: int
    row_bits: int
    rows: int

    @property
    def row_type(self) -> torch.dtype:
        """Of the rows."""
        return torch.int8 if self.row_bits == 8 else torch.bfloat16


def candidates(num_rows: int, bits: int, row_bits: int) -> list[HeadTiles]:
    """Tiles worth timing for this size, breadth first: every tile before its other modes."""
    if num_rows <= 64:
        block_rows = next(b for b in (16, 32, 64) if num_rows <= b)
        base = [HeadTiles(s[0], block_rows, *s[1:]) for s in (_FEW_ROWS if num_rows <= 32 else _SOME_ROWS)]
    else:
        base = [HeadTiles(*s) for s in _MANY_ROWS if s[1] + s[2] <= 2 * num_rows]
    base = [dataclasses.replace(t, gated=num_rows > 32) for t in base]
    ways: tuple[dict[str, Any], ...] = ({"tma": True}, {})
    if num_rows > 32:
        ways += ({"tma": True, "slice_rows": 64}, {"tma": True, "gated": False}, {"gated": False})
    wide = 16 // row_bits  # as many features as fit the same bytes
    special = [
        HeadTiles(v, r, extra, min(128, features * wide), stages=stages, gated=True, tma=True, specialized=True)
        for v, r, extra, features, stages in (_SPECIALIZED if num_rows > 32 else ())
        if r + extra <= max(128, 2 * num_rows)
    ]
    special += [
        HeadTiles(128, r, extra, features * wide, stages=stages, gated=True, tma=True, specialized=True, online=True)
        for r, extra, features, stages in (_ONLINE if num_rows > 32 and bits == row_bits else ())
        if r + extra <= max(128, 2 * num_rows)
    ]
    found = [
        default_tiles(num_rows, torch.bfloat16),
        *special,
        *(dataclasses.replace(t, **way) for way in ways for t in base),
    ]
    return [t for t in dict.fromkeys(found) if bits == 16 or not t.tma or (row_bits == 8 and t.specialized)]


def compiled(points: list[Point], capability: int) -> tuple[set[tuple[Point, HeadTiles]], list[str]]:
    """The points (of no rows) and tiles that compile, and what was wrong with the others."""
    variants = list(
        dict.fromkeys((dataclasses.replace(p, rows=0), t) for p in points for t in candidates(p.rows, p.bits, p.row_bits))
    )
    owners, jobs = [], []
    for point, tiles in variants:
        for job in head_jobs(point.d, point.v, 8, point.bits, tiles, point.row_type):
            owners.append((point, tiles))
            jobs.append(job)
    results = list(zip(owners, compile_ahead(jobs, capability), strict=True))
    bad = {owner for owner, result in results if result.error or result.shared_bytes > 232448}
    troubles = [f"{owner}: {result.error or result.shared_bytes}" for owner, result in results if owner in bad]
    return set(variants) - bad, troubles


def attempt(point: HeadPoint, tiles: HeadTiles) -> dict[str, Any]:
    """`point.measure`, or the error as a result: one failing candidate must not end the sweep."""
    try:
        return point.measure(tiles)
    except (RuntimeError, ValueError) as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def device_lives() -> bool:
    """Whether the GPU still answers: an illegal access spoils the whole process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sweep(points: list[Point], usable: set[tuple[Point, HeadTiles]], out: Path, deadline: float) -> list[dict[str, Any]]:
    """Measure every candidate of every point, one of each point at a time; stops at the deadline (time.perf_counter)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    beds: dict[tuple[int, int, int], HeadBed] = {}
    matmul_us: dict[Point, float] = {}
    lists: dict[Point, list[HeadTiles]] = {}
    results: list[dict[str, Any]] = []
    for point in points:
        p = point
        if (p.v, p.d, p.bits) not in beds:
            beds[p.v, p.d, p.bits] = HeadBed.build(p.v, p.d, p.bits)
        kind = dataclasses.replace(p, rows=0)
        lists[p] = [t for t in candidates(p.rows, p.bits, p.row_bits) if (kind, t) in usable]
    with (out / "head_sweep.jsonl").open("w", encoding="utf-8") as file:
        for rank in range(max(map(len, lists.values()))):
            for point in points:
                if rank >= len(lists[point]):
                    continue
                if time.perf_counter() > deadline or not device_lives():
                    print(f"stopped before candidate {rank} of {point}: out of time, or the GPU does not answer", flush=True)
                    return results
                tiles = lists[point][rank]
                bed_point = beds[point.v, point.d, point.bits].point(point.rows, int8_rows=point.row_bits == 8)
                if point.bits == 16 and point not in matmul_us:
                    matmul_us[point] = bed_point.matmul_us()
                plain = dataclasses.replace(point, bits=16, row_bits=16)
                found = attempt(bed_point, tiles) | {"matmul_us": matmul_us.get(plain)}
                results.append(dataclasses.asdict(point) | {"tiles": dataclasses.asdict(tiles)} | found)
                file.write(json.dumps(results[-1]) + "\n")
                file.flush()
    return results


def summarize(results: list[dict[str, Any]], out: Path, device: str) -> None:
    """Print the best of each point and write head_topk.json."""
    entries = []
    names = [field.name for field in dataclasses.fields(Point)]
    for point in sorted({Point(*(r[name] for name in names)) for r in results}):
        rows = [r for r in results if all(r[name] == getattr(point, name) for name in names)]
        good = sorted((r for r in rows if r["ok"]), key=lambda r: r["us"])
        bad = [r for r in rows if not r["ok"]]
        shown = " | ".join(f"{r['us']:.1f} {list(r['tiles'].values())}" for r in good[:4])
        matmul = f"matmul {rows[0]['matmul_us']:.1f}, " if rows[0].get("matmul_us") else ""
        print(
            f"V={point.v} D={point.d} bits={point.bits} x {point.row_bits} R={point.rows}: "
            f"{matmul}{shown}  BAD {len(bad)} {bad[:1]}",
            flush=True,
        )
        if good:
            shape = {"bits": point.bits, "d": point.d, "v": point.v}
            shape |= {"row_bits": 8} if point.row_bits == 8 else {}
            us = round(good[0]["us"], 2)
            entries.append({"shape": shape, "max_size": point.rows, "choice": good[0]["tiles"], "us": us})
    report = {"certificate": certificate(device), "entries": entries}
    (out / "head_topk.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the results")
    parser.add_argument("--rows", nargs="+", type=int, default=list(HEAD_ROWS))
    parser.add_argument("--bits", nargs="+", default=list(_BITS), choices=list(_BITS), help="of weights (x those of rows)")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds for everything together")
    parser.add_argument("--capability", type=int, default=90, help="compute capability of this GPU (90: H100, H200)")
    options = parser.parse_args()
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    points = [Point(v, d, *_BITS[bits], rows) for v, d in HEADS for bits in options.bits for rows in options.rows]
    usable, troubles = compiled(points, options.capability)
    print(f"compiled {len(usable)} variants in {time.perf_counter() - started:.0f} s; left out {troubles}", flush=True)
    results = sweep(points, usable, options.out, started + options.limit_s)
    summarize(results, options.out, torch.cuda.get_device_name())
    return 0 if all(r["ok"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
