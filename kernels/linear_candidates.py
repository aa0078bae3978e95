"""Tiles worth timing for a linear map: see kernels.linear_tune. N output features, K input features."""

from __future__ import annotations

import dataclasses
import math

from kernels.launch import next_power_of_two
from kernels.linear_bench import LinearShape
from kernels.small_linear import LinearTiles

# (bn, bk, br, warps, stages), most promising first
_FEW_ROWS = [
    (16, 256, 16, 4, 4),
    (32, 128, 16, 4, 5),
    (16, 256, 16, 2, 4),
    (16, 128, 16, 2, 6),
    (32, 256, 16, 4, 4),
    (64, 128, 16, 4, 4),
    (16, 512, 16, 4, 3),
    (32, 128, 16, 2, 6),
    (16, 128, 16, 4, 8),
    (64, 64, 16, 4, 6),
    (32, 256, 16, 8, 3),
    (64, 256, 16, 4, 3),
    (128, 128, 16, 4, 4),
]
_MORE_ROWS = [
    (64, 128, 32, 4, 4),
    (32, 128, 32, 4, 4),
    (64, 64, 64, 4, 5),
    (64, 128, 64, 4, 4),
    (32, 128, 64, 4, 4),
    (16, 128, 32, 4, 5),
    (16, 256, 32, 4, 3),
    (128, 64, 64, 4, 5),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 8, 4),
    (64, 64, 128, 4, 4),
    (128, 64, 128, 8, 4),
    (128, 64, 128, 4, 4),
    (64, 128, 128, 8, 3),
]
# for Hopper's own kernel, from 5 rows on
_SPECIALIZED = [
    (64, 128, 16, 4, 8),
    (64, 256, 16, 4, 5),
    (128, 128, 16, 4, 4),
    (64, 128, 32, 4, 8),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 5),
    (128, 128, 64, 4, 4),
    (256, 64, 64, 8, 5),
    (128, 64, 128, 8, 6),
]
# for int8 rows, Hopper's own kernel
_INT8_ROWS = [
    (64, 128, 16, 4, 8),
    (64, 128, 32, 4, 8),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 128, 64, 4, 8),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (256, 128, 64, 8, 4),
    (128, 128, 128, 8, 4),
    (128, 128, 128, 8, 6),
]
_NO_DOT = [(4, 1), (8, 2), (8, 4), (4, 2), (16, 4), (4, 8), (2, 4), (8, 8)]  # (bn, warps), for 1 to 4 rows
_FIXED = [(64, 128, 16, 4, 4), (64, 128, 32, 4, 4), (64, 64, 64, 4, 5)]  # timed at every size, for the fixed-order mode


def candidates(shape: LinearShape, rows: int, *, overlap: bool = False) -> list[LinearTiles]:
    """Tiles worth timing, likely ones first: torch's GEMM, those of the fixed-order mode (same at every size), then every
    width in its plainest form, then with one thing changed, then with more."""
    found = {LinearTiles(library=True): -2} | dict.fromkeys(fixed_candidates(shape, overlap=overlap), -1)
    if rows <= 4:
        no_dot = [LinearTiles(bn, br=next_power_of_two(rows), warps=warps, overlap=overlap) for bn, warps in _NO_DOT]
        found |= dict.fromkeys(no_dot, 0)
    found |= dict.fromkeys(specialized_candidates(shape, rows, overlap=overlap), 0)
    sets = (_FEW_ROWS if rows <= 32 else []) + ([t for t in _MORE_ROWS if t[2] <= rows] if rows > 16 else [])
    for place, (bn, bk, br, warps, stages) in enumerate(sets):
        programs = -(-shape.n // bn) * -(-rows // br)
        splits = [s for s in (1, 2, 4, 8) if s == 1 or (shape.k >= 2 * bk * s and programs * s <= 800)]
        splits.sort(key=lambda s: abs(math.log2(programs * s / 160)))  # about one program for each multiprocessor
        fuse = [True, False] if shape.norm else [True]  # False: statistics of the rows by a launch of their own
        for changed, split in enumerate(splits[:3]):
            for own_launch, fused in enumerate(fuse):
                for prefetch in (False, True) if split == 1 and rows <= 64 else (False,):
                    tiles = LinearTiles(bn, bk, br, split, warps, stages, fused, prefetch, overlap)
                    found.setdefault(tiles, changed + own_launch + prefetch + place // 8)
                    if shape.norm and fused and br == 64:
                        found.setdefault(dataclasses.replace(tiles, gram=True), changed + prefetch + place // 8)
    return sorted(found, key=found.__getitem__)


def specialized_candidates(shape: LinearShape, rows: int, *, overlap: bool = False) -> list[LinearTiles]:
    """Tiles of Hopper's own kernel, which takes 16-bit weights only."""
    features = shape.n // 3 if shape.cache else shape.n
    return [
        LinearTiles(bn, bk, br, 1, warps, stages, fused, prefetch=True, overlap=overlap, specialized=True)
        for bn, bk, br, warps, stages in _SPECIALIZED
        if rows > 4 and br // 2 < rows <= 16 * br and features % bn == 0 and shape.k % bk == 0
        for fused in ((True, False) if shape.norm else (True,))
    ]


def int8_rows_candidates(shape: LinearShape, rows: int) -> list[LinearTiles]:
    """For int8 rows and weights: Hopper's own kernel, in the forms that serve the shape."""
    features = shape.n // 3 if shape.cache else shape.n
    return [
        LinearTiles(bn, bk, br, 1, warps, stages, prefetch=True, overlap=True, specialized=True)
        for bn, bk, br, warps, stages in _INT8_ROWS
        if (br == 16 or br // 2 < rows) and rows <= 16 * br and features % bn == 0 and shape.k % bk == 0
    ]


def fixed_candidates(shape: LinearShape, *, overlap: bool = False) -> list[LinearTiles]:
    """Tiles for the mode in which a row's bits depend on nothing else."""
    found = []
    for bn, bk, br, warps, stages in _FIXED:
        for fused in (True, False) if shape.norm else (True,):
            splits = [s for s in (1, 4) if shape.k >= 2 * bk * s]
            found += [LinearTiles(bn, bk, br, s, warps, stages, fused, overlap=overlap) for s in splits]
    return found
