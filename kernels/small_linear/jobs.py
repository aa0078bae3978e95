"""Compile jobs of the small linear kernels: the argument types of a real launch, for `kernels.compile_ahead`."""

from __future__ import annotations

from typing import Any

import torch

from kernels.compile_ahead import Job
from kernels.small_linear.constants import (
    finish_constants,
    gemm_constants,
    gemv_constants,
    int8_rows_constants,
    specialized_constants,
    statistics_constants,
)
from kernels.small_linear.launches import block_descriptor
from kernels.small_linear.tiles import LinearTiles
from kernels.weights_ahead import WeightsAhead, ahead_constants

_MODULE = "kernels.small_linear.kernel"
_FINISH = "kernels.small_linear.finish"
_I32 = torch.int32


def linear_jobs(
    n: int,
    k: int,
    tiles: LinearTiles,
    dtype: torch.dtype = torch.bfloat16,
    *,
    int8: bool = False,
    norm: bool = False,
    relu: bool = False,
    mode: int = 0,
    hopper: bool = False,
    chunks: bool = False,
    products: int = 0,
    ahead: WeightsAhead | None = None,
) -> list[Job]:
    """Jobs that cover one call with these tiles (mode 0: plain, 1: residual, 2: keys and values into the cache). chunks:
    with statistics of chunks of the rows, read where a norm is folded in and left of a residual; products: with
    so many vectors besides; ahead: asking for these."""
    f32 = torch.float32
    index = _I32 if mode == 2 else dtype
    vector = f32 if norm else dtype
    if tiles.library:
        constants = finish_constants(n, k, norm=norm, relu=relu, mode=mode, hopper=hopper)
        finish = (vector, dtype, vector, vector, dtype, dtype, index, index, 17, 17, 17, 1e-5)
        return [(_FINISH, "finish_linear_kernel", finish, constants)]
    weight = torch.int8 if int8 else dtype
    operands = (dtype, weight, f32 if int8 else dtype, vector, f32 if norm else weight)
    target = (dtype, dtype, index, index)
    sizes = (17, 17, 17, 1e-5)
    if tiles.no_dot:
        constants = gemv_constants(n, k, tiles, int8=int8, bias=True, norm=norm, relu=relu, mode=mode, hopper=hopper)
        return [("kernels.small_linear.gemv", "gemv_kernel", (*operands, *target, *sizes), constants)]
    jobs: list[Job] = []
    chunks = chunks and tiles.specialized
    leave = chunks and mode == 1
    if norm and not tiles.sums_rows and not chunks:
        jobs.append((_FINISH, "row_statistics_kernel", (dtype, f32, 1e-5), statistics_constants(k, hopper=hopper)))
    in_loop = 3 if tiles.gram and dtype != f32 else 1
    how = 0 if not norm else 3 if chunks else in_loop if tiles.sums_rows else 2
    if tiles.specialized:
        blocks = [
            block_descriptor(torch.empty(rows, k, dtype=dtype, device="meta"), rows, tiles.bk)
            for rows in (tiles.br, tiles.bn)
        ]
        what: dict[str, Any] = {"bias": True, "norm": how, "relu": relu, "mode": mode, "leave": leave}
        constants = specialized_constants(n, k, tiles, **what, products=products) | ahead_constants(ahead)
        router = blocks[0]
        if products:
            router = block_descriptor(torch.empty(3 * products, n, dtype=dtype, device="meta"), products, tiles.bn)
        asked = dtype if ahead is None else ahead.weights.dtype
        statistics = (f32 if how >= 2 else dtype, f32 if leave else dtype)
        given = (dtype, dtype, vector, f32 if norm else dtype, *statistics, dtype, dtype)
        args: tuple[Any, ...] = (*blocks, router, *given, *target, f32 if products else dtype, asked, *sizes)
        return [*jobs, ("kernels.small_linear.specialized", "specialized_linear_kernel", args, constants)]
    constants = gemm_constants(
        n, k, tiles, int8=int8, bias=True, norm=how, relu=relu, mode=mode, hopper=hopper, aligned=True
    )
    parts = (f32, _I32) if tiles.split > 1 else (dtype, dtype)
    args = (*operands, f32 if how == 2 else weight, *target, *parts, *sizes)
    return [*jobs, (_MODULE, "small_linear_kernel", args, constants)]


def int8_rows_jobs(
    n: int,
    k: int,
    tiles: LinearTiles,
    dtype: torch.dtype = torch.bfloat16,
    *,
    folded: bool = True,
    relu: bool = False,
    mode: int = 0,
    integer: bool = True,
    hopper: bool = False,
) -> list[Job]:
    """As `linear_jobs` for int8 rows and int8 weights; folded: over a folded norm, whose bias is fp32."""
    f32, code = torch.float32, torch.int8
    index = _I32 if mode == 2 else dtype
    bias, target, sizes = f32 if folded else dtype, (dtype, dtype, index, index), (17, 17, 17)
    if not tiles.specialized:
        constants = int8_rows_constants(n, k, tiles, bias=True, relu=relu, mode=mode, integer=integer, hopper=hopper)
        args: tuple[Any, ...] = (code, code, f32, f32, bias, *target, *sizes)
        return [("kernels.small_linear.int8_rows_kernel", "int8_rows_kernel", args, constants)]
    blocks = [
        block_descriptor(torch.empty(rows, k, dtype=code, device="meta"), rows, tiles.bk) for rows in (tiles.br, tiles.bn)
    ]
    constants = specialized_constants(n, k, tiles, bias=True, norm=0, relu=relu, mode=mode) | ahead_constants(None)
    args = (*blocks, blocks[0], code, code, bias, f32, f32, f32, f32, f32, *target, f32, code, *sizes, 1e-5)
    return [("kernels.small_linear.specialized", "specialized_linear_kernel", args, constants)]


def default_jobs(d_model: int, capability: int) -> list[Job]:
    """What the default tiles of a decoder layer (D, F = 4 D) ask of a device of this capability, and a few others."""
    from kernels.small_linear.tiles import default_tiles, select_tiles_int8_rows

    dtype = torch.float16 if capability < 80 else torch.bfloat16
    d = d_model
    found: list[Job] = []
    # (N, K, norm, relu, mode): fused QKV, output projection, both of the feed-forward
    for n, k, norm, relu, mode in (
        (3 * d, d, True, False, 2),
        (d, d, False, False, 1),
        (4 * d, d, True, True, 0),
        (d, 4 * d, False, False, 1),
    ):
        for bits in (8, 16):
            wanted = {default_tiles(n, k, rows, bits, fixed=False) for rows in (1, 32, 64, 320)}
            wanted |= {default_tiles(n, k, 1, bits, fixed=True), LinearTiles(32, 128, 16, split=4, fuse_norm=False)}
            wanted.add(LinearTiles(4, br=2))
            if capability >= 90:
                wanted |= {LinearTiles(16, 256, 16, stages=3, prefetch=True, overlap=overlap) for overlap in (False, True)}
            if capability == 90 and bits == 16:
                wanted |= {LinearTiles(64, 128, br, stages=5, overlap=True, specialized=True) for br in (32, 64)}
            for tiles in sorted(wanted, key=repr):
                if bits != 8 or not tiles.library:
                    what = {"norm": norm, "relu": relu, "mode": mode, "hopper": capability >= 90}
                    found += linear_jobs(n, k, tiles, dtype, int8=bits == 8, **what)  # type: ignore[arg-type]
                    if tiles.specialized:
                        found += linear_jobs(n, k, tiles, dtype, chunks=True, **what)  # type: ignore[arg-type]
    for n, relu, mode in ((3 * d, False, 2), (d, False, 0), (4 * d, True, 0)):
        own = {select_tiles_int8_rows(n, d, rows, torch.device("meta")) for rows in (1, 32, 320)}
        if capability == 90:
            own |= {LinearTiles(64, 128, br, stages=8, prefetch=True, overlap=True, specialized=True) for br in (32, 64)}
        for tiles in sorted(own, key=repr):
            options = {"relu": relu, "mode": mode, "integer": capability >= 80, "hopper": capability >= 90}
            found += int8_rows_jobs(n, d, tiles, dtype, **options)  # type: ignore[arg-type]
    found += linear_jobs(d, d, default_tiles(d, d, 64, 32, fixed=False), torch.float32, norm=True)
    return found
