"""Which expert-FFN tiles the sweep of kernels.tune times, and their names."""

from __future__ import annotations

import dataclasses

from kernels.cases import FfnShape, Precision
from kernels.expert_gemm.tiles import FfnTiles

MODES = ("plain", "static", "dynamic", "pipelined")

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
_FEW_PAIRS = [(128, 64, 4, 4, 3), (128, 128, 4, 4, 3), (64, 64, 4, 4, 3), (64, 64, 4, 4, 5)]  # with 8 pairs a tile
_NARROW = [(128, 128, 2, 4, 3), (64, 64, 2, 4, 3), (64, 64, 4, 4, 4)]  # with 32 pairs a tile, for most experts 16
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
# (block_tokens, bn1, bn2, warps, steps of weights, steps of x), by bits
_PIPELINED = {
    4: [
        (32, 128, 128, 4, 3, 3),
        (64, 128, 128, 4, 2, 2),
        (64, 256, 256, 8, 2, 2),
        (128, 256, 256, 8, 2, 2),
        (128, 256, 128, 8, 2, 2),
        (64, 128, 64, 4, 2, 2),
        (128, 128, 128, 4, 2, 1),
        (32, 128, 128, 4, 2, 2),
        (32, 128, 64, 4, 2, 2),
        (64, 64, 64, 4, 2, 1),
    ],
    8: [
        (64, 128, 128, 4, 3, 2),
        (128, 128, 128, 4, 2, 2),
        (128, 256, 128, 8, 3, 3),
        (64, 128, 64, 4, 3, 2),
        (128, 256, 256, 8, 3, 3),
        (32, 128, 64, 4, 3, 3),
        (128, 128, 64, 4, 2, 2),
        (64, 64, 64, 4, 3, 3),
    ],
}


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
        if mean >= 4 and precision.bits < 16:
            for bn1, bn2, join, warps, stages in _NARROW:
                found.append(FfnTiles(32, bn1, bn2, join, warps, stages, narrow=16))
        elif precision.bits < 16:
            for bn1, bn2, join, warps, stages in _FEW_PAIRS:
                base = FfnTiles(8, bn1, bn2, join, warps, stages)
                found += [base, dataclasses.replace(base, fused=True, split=splits[0], dynamic=True)]
    if mean >= 6:
        for block, bn1, bn2, join, warps, stages in _ENCODE_BF16 if precision.bits == 16 else _ENCODE:
            if block <= 2 * mean + 16 and (block >= 64 or mean < 100):
                base = FfnTiles(block, bn1, bn2, join, warps, stages)
                found += [base, dataclasses.replace(base, fused=True, dynamic=True)]
                if block <= 64 and mean < block:
                    found.append(dataclasses.replace(base, narrow=block // 2))
    if mean >= 10 and precision.group_size == 0:
        for block, bn1, bn2, warps, stages, x_stages in _PIPELINED.get(precision.bits, []):
            if block <= 2 * mean + 16:
                tiles = FfnTiles(block, bn1, bn2, warps=warps, stages=stages, pipelined=True, x_stages=x_stages)
                found.append(dataclasses.replace(tiles, programs_per_sm=1 if warps == 8 else 2))
        found += [
            dataclasses.replace(t, narrow=t.block_tokens // 2) for t in found if t.pipelined and mean < 2 * t.block_tokens
        ]
    if precision.group_size:
        found = [t for t in found if t.join in (2, precision.group_size // 32)]
    likely = ("static", "dynamic", "plain") if num_tokens <= 4 else ("pipelined", "plain", "dynamic", "static")
    return sorted(found, key=lambda t: likely.index(mode_of(t)))


def variant_key(shape: FfnShape, precision: Precision, tiles: FfnTiles) -> str:
    """Name of one compiled variant."""
    return f"{shape.name}/{precision.name}/{tiles_key(tiles)}"


def mode_of(tiles: FfnTiles) -> str:
    """plain (two launches), static (fused, cooperative), dynamic (fused, tickets) or pipelined (Hopper, many tokens)."""
    if tiles.pipelined:
        return "pipelined"
    return "plain" if not tiles.fused else "dynamic" if tiles.dynamic else "static"


def tiles_key(tiles: FfnTiles) -> str:
    """Compact name of a tile choice."""
    width = f"{tiles.block_tokens}.{tiles.narrow}" if tiles.narrow else str(tiles.block_tokens)
    if tiles.pipelined:
        return f"t{width} n{tiles.bn1}/{tiles.bn2} w{tiles.warps} s{tiles.stages}/{tiles.x_stages} pipelined"
    mode = (
        f"fused split{tiles.split}{' prefetch' if tiles.prefetch else ''}{' dynamic' if tiles.dynamic else ''}"
        if tiles.fused
        else "plain"
    )
    return f"t{width} n{tiles.bn1}/{tiles.bn2} j{tiles.join} w{tiles.warps} s{tiles.stages} {mode}"
