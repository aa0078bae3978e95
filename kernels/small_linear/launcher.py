"""Launcher of `small_linear` and `qkv_linear`. R rows, N output features, K inputs, D d_model, H heads, Dh head size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kernels.launch import check
from kernels.small_linear.constants import finish_constants, gemm_constants, statistics_constants
from kernels.small_linear.folded import FoldedLinear
from kernels.small_linear.int8 import Int8Linear
from kernels.small_linear.scratch import SPLIT_ROWS, LinearScratch, buffer, split_sizes
from kernels.small_linear.tiles import LinearTiles, select_tiles

Weight = torch.Tensor | Int8Linear | FoldedLinear
_OUT, _RESIDUAL, _QKV = 0, 1, 2  # MODE of the kernels
_IN_LOOP, _GIVEN = 1, 2  # NORM of the kernel: where a row's mean and standard deviation come from


@dataclass(frozen=True, slots=True)
class _Cache:
    """Where keys and values go: cells [rows, positions, 2, D], and int32[R] each."""

    cells: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


def small_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    *,
    relu: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: LinearTiles | None = None,
    fixed: bool = False,
    scratch: LinearScratch | None = None,
) -> torch.Tensor:
    """relu(x W^T + bias) -> out [R, N]; or, with a residual, added to it in place, and the residual is returned.

    x fp32/bf16/fp16[R, K]; weight [N, K] of x's dtype, or Int8Linear; bias [N] of x's dtype. A FoldedLinear as weight
    (`fold_norm`; its bias is its own) takes the layer norm of each row first, which costs no pass over x and rounds nothing
    in between. residual [R, N] of x's dtype: the sum is taken in fp32 and rounded once. fp32 accumulation; fp32 weights are
    multiplied as fp32, not tf32. In fp16 what would be +-inf becomes +-(65504 - 1000), as NLLB clamps. out and residual must
    not be x.

    Tiles come from the shape: `fixed` picks them by (N, K) alone, so that a row's bits depend neither on R nor on the other
    rows. Capture-safe: no host sync. With a scratch (`linear_scratch`, one per stream) nothing but `out` is allocated;
    without one, a split of K, statistics by a launch of their own and a library GEMM take theirs from torch's allocator in
    every call (as a folded library GEMM in fp32 does always).
    Raises ValueError for operands that do not belong together.
    """
    n = weight.shape[0]
    check(out is None or residual is None, "the result of a call with a residual is the residual: leave out=None")
    mode = _OUT if residual is None else _RESIDUAL
    result = residual if residual is not None else out
    result = x.new_empty((x.shape[0], n)) if result is None else result
    _check_result(result, (x.shape[0], n), x, "out" if residual is None else "residual")
    _linear(x, weight, bias, relu, mode, result, None, tiles, fixed, scratch)
    return result


def qkv_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    cells: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    q_out: torch.Tensor | None = None,
    tiles: LinearTiles | None = None,
    fixed: bool = False,
    scratch: LinearScratch | None = None,
) -> torch.Tensor:
    """Queries, keys and values of R new tokens in one GEMM -> queries [R, D]; keys and values go straight into the cache.

    x [R, K]; weight [3D, K] (queries, keys, values), bias [3D]; cells: one layer of the cache, [rows, T_max, 2, H, Dh] of
    x's dtype with H * Dh = D, contiguous. Entry e's key and value are written to cells[rows[e], positions[e]] (int32[R]
    each); a row or position outside the cache (-1: inactive entry) writes nothing there, its query is still computed.
    Two entries must not name the same cell. The rest as in `small_linear`.
    """
    n = weight.shape[0]
    check(n % 3 == 0, f"weight has {n} output features; want 3 * D (queries, keys, values)")
    d = n // 3
    check(
        cells.dim() == 5 and cells.shape[2] == 2 and cells.shape[3] * cells.shape[4] == d,
        f"cells are {list(cells.shape)}; want [rows, T_max, 2, H, Dh] with H * Dh = {d}",
    )
    check(cells.is_contiguous(), "cells must be contiguous: pass one layer of the cache")
    check(cells.dtype == x.dtype, f"cells are {cells.dtype}, x is {x.dtype}: allocate the cache in x's dtype")
    for name, index in (("rows", rows), ("positions", positions)):
        check(
            index.dtype == torch.int32 and index.shape == x.shape[:1] and index.is_contiguous(),
            f"{name} is {index.dtype}{list(index.shape)}; want contiguous int32[{x.shape[0]}]",
        )
    q = x.new_empty((x.shape[0], d)) if q_out is None else q_out
    _check_result(q, (x.shape[0], d), x, "q_out")
    _linear(x, weight, bias, False, _QKV, q, _Cache(cells, rows, positions), tiles, fixed, scratch)
    return q


def _check_result(result: torch.Tensor, shape: tuple[int, int], x: torch.Tensor, name: str) -> None:
    check(
        tuple(result.shape) == shape and result.dtype == x.dtype and result.is_contiguous(),
        f"{name} is {result.dtype}{list(result.shape)}; want contiguous {x.dtype}{list(shape)}",
    )
    check(result.data_ptr() != x.data_ptr() or x.numel() == 0, f"{name} is x itself: give it memory of its own")


def _check_operands(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> None:
    check(x.dim() == 2 and x.is_contiguous(), f"x is {list(x.shape)}; want contiguous [R, K]")
    check(x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"x is {x.dtype}; choose float32, float16 or bfloat16")
    n, k = weight.shape
    check(k == x.shape[1], f"weight is [{n}, {k}]; x wants [N, {x.shape[1]}]")
    matrix, is_int8 = _matrix(weight)
    check(matrix.is_contiguous(), "weight must be contiguous: call .contiguous()")
    check(is_int8 or matrix.dtype == x.dtype, f"weight is {matrix.dtype}, x is {x.dtype}: convert one of them")
    check(bias is None or not isinstance(weight, FoldedLinear), "a folded weight has its bias with it: leave bias=None")
    check(
        bias is None or (bias.shape == (n,) and bias.dtype == x.dtype and bias.is_contiguous()),
        f"bias is {None if bias is None else (bias.dtype, list(bias.shape))}; want {x.dtype}[{n}]",
    )


def _matrix(weight: Weight) -> tuple[torch.Tensor, bool]:
    """What the GEMM streams, [N, K], and whether it is int8 codes."""
    stored = weight.weight if isinstance(weight, FoldedLinear) else weight
    return (stored.codes, True) if isinstance(stored, Int8Linear) else (stored, False)


def _linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: _Cache | None,
    tiles: LinearTiles | None,
    fixed: bool,
    scratch: LinearScratch | None,
) -> None:
    """Check, choose tiles, launch: [row statistics,] GEMM with its epilogue, or library GEMM [, epilogue]."""
    _check_operands(x, weight, bias)
    (n, k), rows = weight.shape, x.shape[0]
    if rows == 0:
        return
    matrix, is_int8 = _matrix(weight)
    folded = isinstance(weight, FoldedLinear)
    tiles = tiles or select_tiles(n, k, rows, matrix.dtype.itemsize * 8, x.device, norm=folded, fixed=fixed)
    check(not (tiles.library and is_int8), "no library GEMM takes int8 weights here: choose tiles with library=False")
    if tiles.library:
        _library(x, weight, bias, relu, mode, result, cache, scratch)
        return
    statistics = None
    if isinstance(weight, FoldedLinear) and not tiles.sums_rows:
        statistics = buffer(scratch, "statistics", rows * 2, torch.float32, x.device).view(rows, 2)
        _launch_statistics(x, weight.eps, statistics)
    step = rows if tiles.split == 1 else SPLIT_ROWS
    for at in range(0, rows, step):
        part = slice(at, at + step)
        here = None if cache is None else _Cache(cache.cells, cache.rows[part], cache.positions[part])
        known = None if statistics is None else statistics[part]
        _launch_gemm(x[part], weight, bias, known, relu, mode, result[part], here, tiles, scratch)


def _library(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: _Cache | None,
    scratch: LinearScratch | None,
) -> None:
    """torch's GEMM; a folded one over raw rows leaves fp32, since what the mean takes off may be most of it."""
    matrix, _ = _matrix(weight)
    rows, n = x.shape[0], matrix.shape[0]
    if isinstance(weight, FoldedLinear):
        product = buffer(scratch, "partial", rows * n, torch.float32, x.device).view(rows, n)
        if x.dtype == torch.float32:
            x = x - x.mean(dim=1, keepdim=True)  # else the product's own rounding would grow with the mean
        if x.dtype == torch.float32 or x.device.type == "cpu":  # torch has no mixed product on the CPU
            torch.mm(x.float(), matrix.float().T, out=product)
        else:
            torch.mm(x, matrix.T, out_dtype=torch.float32, out=product)
        _launch_finish(product, x, weight, relu, mode, result, cache)
        return
    product = result
    if mode != _OUT:
        product = buffer(scratch, "product", rows * n, x.dtype, x.device).view(rows, n)
    if bias is None:
        torch.mm(x, matrix.T, out=product)
    else:
        torch.addmm(bias, x, matrix.T, out=product)
    if mode != _OUT or relu or x.dtype == torch.float16:
        _launch_finish(product, x, None, relu, mode, result, cache)


def _launch_statistics(x: torch.Tensor, eps: float, statistics: torch.Tensor) -> None:
    from kernels.small_linear.kernel import row_statistics_kernel

    row_statistics_kernel[(x.shape[0],)](x, statistics, eps, **statistics_constants(x.shape[1]))


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch_gemm(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    statistics: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: _Cache | None,
    tiles: LinearTiles,
    scratch: LinearScratch | None,
) -> None:
    from kernels.small_linear.kernel import small_linear_kernel

    (n, k), rows = weight.shape, x.shape[0]
    folded = weight if isinstance(weight, FoldedLinear) else None
    stored = weight.weight if isinstance(weight, FoldedLinear) else weight
    matrix, is_int8 = _matrix(weight)
    bias = bias if folded is None else folded.bias
    norm = 0 if folded is None else _IN_LOOP if statistics is None else _GIVEN
    floats, blocks = split_sizes(tiles, n, rows, folded=folded is not None)
    partial = semaphores = result
    if tiles.split > 1:
        partial = buffer(scratch, "partial", floats, torch.float32, x.device)
        semaphores = buffer(scratch, "semaphores", blocks, torch.int32, x.device)
    small_linear_kernel[(-(-rows // tiles.br), -(-n // tiles.bn), tiles.split)](
        x,
        matrix,
        stored.scales if isinstance(stored, Int8Linear) else matrix,
        matrix if bias is None else bias,
        matrix if folded is None else folded.column_sums,
        matrix if statistics is None else statistics,
        result,
        result if cache is None else cache.cells,
        result if cache is None else cache.rows,
        result if cache is None else cache.positions,
        partial,
        semaphores,
        rows,
        0 if cache is None else cache.cells.shape[0],
        0 if cache is None else cache.cells.shape[1],
        0.0 if folded is None else folded.eps,
        **gemm_constants(
            n,
            k,
            tiles,
            int8=is_int8,
            bias=bias is not None,
            norm=norm,
            relu=relu,
            mode=mode,
            hopper=_is_hopper(x.device),
            aligned=x.dtype != torch.float32 and k * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0,
        ),
    )


def _launch_finish(
    product: torch.Tensor,
    x: torch.Tensor,
    folded: FoldedLinear | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: _Cache | None,
) -> None:
    from kernels.small_linear.kernel import finish_linear_kernel

    rows, n = product.shape
    constants = finish_constants(n, x.shape[1], norm=folded is not None, relu=relu, mode=mode)
    finish_linear_kernel[(rows, -(-n // constants["BLOCK"]))](
        product,
        x,
        product if folded is None else folded.column_sums,
        product if folded is None else folded.bias,
        result,
        result if cache is None else cache.cells,
        result if cache is None else cache.rows,
        result if cache is None else cache.positions,
        rows,
        0 if cache is None else cache.cells.shape[0],
        0 if cache is None else cache.cells.shape[1],
        0.0 if folded is None else folded.eps,
        **constants,
    )
