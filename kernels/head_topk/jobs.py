"""Compile jobs of `head_topk`: the argument types of a real launch, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.compile_ahead import Job
from kernels.head_topk.constants import chunk_constants, chunk_options, merge_constants, start_constants
from kernels.head_topk.launcher import operands, token_scales
from kernels.head_topk.tiles import HeadTiles, default_tiles

_MODULE = "kernels.head_topk.kernel"


def head_jobs(
    num_features: int,
    vocab_size: int,
    k: int,
    bits: int,
    tiles: HeadTiles,
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_banned: bool = True,
) -> list[Job]:
    """Jobs that cover one call with these tiles: all launches, the products first."""
    f32, i32 = torch.float32, torch.int32
    weight = torch.int8 if bits == 8 else dtype
    inputs: tuple[object, ...] = dtype, weight, dtype
    if tiles.tma:  # only the types and block shapes matter: meta tensors have no memory
        x, matrix = (torch.empty(1024, num_features, dtype=t, device="meta") for t in (dtype, weight))
        inputs = operands(x, matrix, tiles)
    outputs = (f32, f32, f32, 320, vocab_size)
    merge = (f32, f32, i32, f32, f32, f32, f32, i32, f32, 320, 320, 132, vocab_size)
    constants = chunk_constants(num_features, vocab_size, k, bits, has_banned, tiles) | chunk_options(tiles)
    jobs: list[Job]
    if tiles.online:
        scales = (token_scales(torch.empty(1024, device="meta")), f32) if bits == 8 else (None, None)
        arguments = (*inputs[:2], i32, i32, f32, f32, f32, *scales, 320, vocab_size, 1001)
        jobs = [("kernels.head_topk.online", "head_online_kernel", arguments, constants)]
    elif tiles.specialized:
        name = "head_specialized_kernel"
        jobs = [("kernels.head_topk.specialized", name, (*inputs, f32, f32, i32, i32, i32, *outputs, 1001), constants)]
    else:
        jobs = [(_MODULE, "head_chunk_kernel", (*inputs, f32, f32, i32, i32, *outputs), constants)]
    merge_options = merge_constants(k, vocab_size, bits, has_banned, tiles) | {"num_warps": 4}
    jobs.append(("kernels.head_topk.merge", "head_merge_kernel", merge, merge_options))
    if tiles.gated or tiles.specialized:
        start = start_constants(vocab_size, has_banned, tiles)
        jobs.append((_MODULE, "head_start_kernel", (i32, i32, i32, 1001, 1001, vocab_size), start))
    return jobs


def default_head_jobs(num_features: int, vocab_size: int, dtype: torch.dtype) -> list[Job]:
    """Everything that a device without a measured choice may be asked to run for this head; dtype is that of the rows, int8
    for `QuantizedRows` (compute capability 8.0 on)."""
    return [
        job
        for rows in (16, 32, 1024)
        for bits in ((8,) if dtype == torch.int8 else (16, 8))
        for job in head_jobs(num_features, vocab_size, 16, bits, default_tiles(rows, dtype), dtype)
    ]


def hopper_head_jobs(num_features: int, vocab_size: int, dtype: torch.dtype) -> list[Job]:
    """The first launches that only Hopper runs, in every shape of tile that has been worth tuning there."""
    shapes = (
        (128, 128, 0, 64, 6),
        (128, 128, 64, 64, 5),
        (256, 128, 0, 64, 4),
        (128, 256, 0, 64, 4),
        (128, 256, 64, 64, 4),
    )
    bits, wide = (8, 2) if dtype == torch.int8 else (16, 1)  # twice as many features in the same bytes
    return [
        head_jobs(num_features, vocab_size, 16, bits, tiles, dtype)[0]
        for v, rows, extra, features, stages in shapes
        for tiles in [HeadTiles(v, rows, extra, features * wide, stages=stages, gated=True, tma=True, specialized=True)]
    ] + [
        head_jobs(num_features, vocab_size, 16, bits, tiles, dtype)[0]
        for rows, extra, stages in ((128, 0, 8), (128, 64, 7), (256, 0, 8), (256, 64, 6))
        for tiles in [
            HeadTiles(128, rows, extra, 64 * wide, stages=stages, gated=True, tma=True, specialized=True, online=True)
        ]
    ]
