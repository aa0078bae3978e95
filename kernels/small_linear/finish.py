"""Launches of their own around a GEMM that does not do it itself: statistics of its rows before, and what follows a library
GEMM. R rows, N output features, K input features. MODE: see epilogue.py.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import let_next_start_and_wait
from kernels.small_linear.epilogue import load_target, store_target


@triton.jit
def _row_statistics(x_row, eps, K: tl.constexpr, K_PAD: tl.constexpr):
    """Mean and 1 / standard deviation of one row, the mean taken off before squaring."""
    k = tl.arange(0, K_PAD)
    mask = k < K
    x = tl.load(x_row + k, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / K
    centered = tl.where(mask, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 0) / K + eps)


@triton.jit
def row_statistics_kernel(x_ptr, statistics_ptr, eps, K: tl.constexpr, K_PAD: tl.constexpr, OVERLAP: tl.constexpr):
    """One program = mean and 1 / standard deviation of one row, for tiles that do not sum up rows themselves."""
    let_next_start_and_wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = _row_statistics(x_ptr + row * K, eps, K, K_PAD)
    tl.store(statistics_ptr + row * 2, mean)
    tl.store(statistics_ptr + row * 2 + 1, rstd)


@triton.jit(do_not_specialize=["R", "num_cells", "num_positions"])
def finish_linear_kernel(
    product_ptr,
    x_ptr,
    column_sums_ptr,
    bias_ptr,
    out_ptr,
    cells_ptr,
    rows_ptr,
    positions_ptr,
    R,
    num_cells,
    num_positions,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What follows a library GEMM: one program = BLOCK features of one row of product [R, N]; NORM: of raw rows, fp32."""
    r = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if NORM:
        column_sums = tl.load(column_sums_ptr + n, mask=n < N, other=0.0)
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    let_next_start_and_wait(OVERLAP)
    live = (n < N) & (r < R)
    place = (r + tl.zeros((BLOCK,), tl.int64), n, live)
    before = load_target(out_ptr, rows_ptr, positions_ptr, *place, N, MODE)
    y = tl.load(product_ptr + r * N + n, mask=live, other=0.0).to(tl.float32)
    if NORM:
        mean, rstd = _row_statistics(x_ptr + r * K, eps, K, K_PAD)
        y = (y - column_sums * mean) * rstd + bias
    store_target(y, *before, *place, out_ptr, cells_ptr, num_cells, num_positions, N, RELU, MODE)
