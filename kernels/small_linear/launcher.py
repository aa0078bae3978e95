"""Launcher of `small_linear` and `qkv_linear`. R rows, N output features, K inputs, D d_model, H heads, Dh head size."""

from __future__ import annotations

import torch

from kernels.launch import check
from kernels.quantized_rows import QuantizedRows
from kernels.row_products import RowProducts
from kernels.row_statistics import RowStatistics
from kernels.small_linear.folded import FoldedLinear
from kernels.small_linear.int8_rows import check_int8_rows, launch_int8_rows
from kernels.small_linear.launches import (
    OUT,
    QKV,
    RESIDUAL,
    Cache,
    Weight,
    check_specialized,
    launch_gemm,
    launch_library,
    launch_specialized,
    launch_statistics,
    serves_products,
    stored_matrix,
)
from kernels.small_linear.scratch import SPLIT_ROWS, LinearScratch, buffer
from kernels.small_linear.tiles import LinearTiles, select_tiles, select_tiles_int8_rows
from kernels.weights_ahead import WeightsAhead

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def small_linear(
    x: torch.Tensor | QuantizedRows,
    weight: Weight,
    bias: torch.Tensor | None = None,
    *,
    relu: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: LinearTiles | None = None,
    fixed: bool = False,
    scratch: LinearScratch | None = None,
    dtype: torch.dtype | None = None,
    statistics: RowStatistics | None = None,
    products: RowProducts | None = None,
    ahead: WeightsAhead | None = None,
) -> torch.Tensor:
    """relu(x W^T + bias) -> out [R, N]; or, with a residual, added to it in place, and the residual is returned.

    x fp32/bf16/fp16[R, K]; weight [N, K] of x's dtype, or Int8Linear; bias [N] of x's dtype. A FoldedLinear as weight
    (`fold_norm`; its bias is its own) takes the layer norm of each row first, which costs no pass over x and rounds nothing
    in between. residual [R, N] of x's dtype: the sum is taken in fp32 and rounded once. fp32 accumulation; fp32 weights are
    multiplied as fp32, not tf32. In fp16 what would be +-inf becomes +-(65504 - 1000), as NLLB clamps. out and residual must
    not be x.

    x as QuantizedRows goes with int8 weights: products int8 x int8 are summed in int32, then times the scales of row and
    feature. With a FoldedLinear its rows are those of `add_layernorm_int8` without weight and bias. Where neither out nor
    residual says the result's dtype, `dtype` must; bias is of it.

    Tiles come from the shape: `fixed` picks them by (N, K) alone, so that a row's bits depend neither on R nor on the other
    rows. Capture-safe: no host sync. With a scratch (`linear_scratch`, one per stream) nothing but `out` is allocated;
    without one, a split of K, statistics by a launch of their own and a library GEMM take theirs from torch's allocator in
    every call (as a folded library GEMM in fp32 does always).
    statistics: with a residual, where the new residual's go if these tiles can leave them (`valid` says so afterwards); with
    a FoldedLinear, those of x: where they are valid and the tiles can read them, nobody sums x up again. The sums are taken
    in another order then.
    products: with a residual and statistics, the new residual's products are left there, too, where these tiles can (else
    `parts` is None afterwards).
    ahead: what a launch behind this one begins with, to be asked for in L2 by tiles that can (`specialized`).
    Raises ValueError for operands that do not belong together.
    """
    n = weight.shape[0]
    check(products is None or products.thirds.shape[1] == n, f"products are not of rows of {n} features")
    check(out is None or residual is None, "the result of a call with a residual is the residual: leave out=None")
    mode = OUT if residual is None else RESIDUAL
    result = residual if residual is not None else out
    if result is None:
        dtype = x.dtype if isinstance(x, torch.Tensor) else dtype
        check(dtype is not None, "int8 rows do not say the result's dtype: pass out, residual or dtype")
        result = torch.empty((x.shape[0], n), dtype=dtype, device=x.device)
    _check_result(result, (x.shape[0], n), x, "out" if residual is None else "residual")
    _linear(x, weight, bias, relu, mode, result, None, tiles, fixed, scratch, statistics, products, ahead)
    return result


def qkv_linear(
    x: torch.Tensor | QuantizedRows,
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
    statistics: RowStatistics | None = None,
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
    if isinstance(x, torch.Tensor):
        check(cells.dtype == x.dtype, f"cells are {cells.dtype}, x is {x.dtype}: allocate the cache in x's dtype")
    for name, index in (("rows", rows), ("positions", positions)):
        check(
            index.dtype == torch.int32 and tuple(index.shape) == (x.shape[0],) and index.is_contiguous(),
            f"{name} is {index.dtype}{list(index.shape)}; want contiguous int32[{x.shape[0]}]",
        )
    q = torch.empty((x.shape[0], d), dtype=cells.dtype, device=cells.device) if q_out is None else q_out
    _check_result(q, (x.shape[0], d), x, "q_out", cells.dtype)
    _linear(x, weight, bias, False, QKV, q, Cache(cells, rows, positions), tiles, fixed, scratch, statistics, None, None)
    return q


def _check_result(
    result: torch.Tensor,
    shape: tuple[int, int],
    x: torch.Tensor | QuantizedRows,
    name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """dtype: what a result of int8 rows must be; None: any float."""
    dtype = x.dtype if isinstance(x, torch.Tensor) else dtype or result.dtype
    check(
        tuple(result.shape) == shape and result.dtype == dtype and result.is_contiguous(),
        f"{name} is {result.dtype}{list(result.shape)}; want contiguous {dtype}{list(shape)}",
    )
    if isinstance(x, torch.Tensor):
        check(result.data_ptr() != x.data_ptr() or x.numel() == 0, f"{name} is x itself: give it memory of its own")
    else:
        check(dtype in _FLOATS, f"{name} is {dtype}; choose float32, float16 or bfloat16")


def _check_operands(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> None:
    check(x.dim() == 2 and x.is_contiguous(), f"x is {list(x.shape)}; want contiguous [R, K]")
    check(x.dtype in _FLOATS, f"x is {x.dtype}; choose float32, float16 or bfloat16")
    n, k = weight.shape
    check(k == x.shape[1], f"weight is [{n}, {k}]; x wants [N, {x.shape[1]}]")
    matrix, is_int8 = stored_matrix(weight)
    check(matrix.is_contiguous(), "weight must be contiguous: call .contiguous()")
    check(is_int8 or matrix.dtype == x.dtype, f"weight is {matrix.dtype}, x is {x.dtype}: convert one of them")
    check(bias is None or not isinstance(weight, FoldedLinear), "a folded weight has its bias with it: leave bias=None")
    check(
        bias is None or (bias.shape == (n,) and bias.dtype == x.dtype and bias.is_contiguous()),
        f"bias is {None if bias is None else (bias.dtype, list(bias.shape))}; want {x.dtype}[{n}]",
    )


def _linear(
    x: torch.Tensor | QuantizedRows,
    weight: Weight,
    bias: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: Cache | None,
    tiles: LinearTiles | None,
    fixed: bool,
    scratch: LinearScratch | None,
    known: RowStatistics | None,
    products: RowProducts | None,
    ahead: WeightsAhead | None,
) -> None:
    """Check, choose tiles, launch: [row statistics,] GEMM with its epilogue, or library GEMM [, epilogue]."""
    (n, k), rows = weight.shape, x.shape[0]
    leave = None  # where this launch leaves statistics of its result
    if mode == RESIDUAL and known is not None:
        known.valid = False
    if products is not None:
        products.parts = None
    if isinstance(x, QuantizedRows):
        check_int8_rows(x, weight, bias, result.dtype)
        if rows > 0:
            tiles = tiles or select_tiles_int8_rows(n, k, rows, x.device)
            launch_int8_rows(x, weight, bias, relu, mode, result, cache, tiles, ahead)
        return
    _check_operands(x, weight, bias)
    if rows == 0:
        return
    matrix, is_int8 = stored_matrix(weight)
    folded = isinstance(weight, FoldedLinear)
    tiles = tiles or select_tiles(n, k, rows, matrix.dtype.itemsize * 8, x.device, norm=folded, fixed=fixed)
    check(not (tiles.library and is_int8), "no library GEMM takes int8 weights here: choose tiles with library=False")
    if tiles.library:
        launch_library(x, weight, bias, relu, mode, result, cache, scratch)
        return
    if tiles.specialized:
        check_specialized(x, weight, mode, tiles)
    statistics = None
    if isinstance(weight, FoldedLinear):
        if known is not None and known.valid and tiles.specialized and known.serves(rows, k):
            statistics = known.chunks
        elif not tiles.sums_rows:
            statistics = buffer(scratch, "statistics", rows * 2, torch.float32, x.device).view(rows, 2)
            launch_statistics(x, weight.eps, statistics)
    if tiles.specialized:
        if mode == RESIDUAL and known is not None and known.serves(rows, n):
            known.valid, leave = True, known.chunks
        if products is not None and not (leave is not None and serves_products(x, tiles, products)):
            products = None
        launch_specialized(
            x, weight, bias, statistics, relu, mode, result, cache, tiles, leave=leave, products=products, ahead=ahead
        )
        return
    step = rows if tiles.split == 1 else SPLIT_ROWS
    for at in range(0, rows, step):
        part = slice(at, at + step)
        here = None if cache is None else Cache(cache.cells, cache.rows[part], cache.positions[part])
        here_statistics = None if statistics is None else statistics[part]
        launch_gemm(x[part], weight, bias, here_statistics, relu, mode, result[part], here, tiles, scratch)
