"""Linear map over one to four rows without tensor cores: a program holds its rows of the weights whole, in registers.

It asks for them, and for all else that no kernel before writes, before it waits for the kernel before: in a chain of
overlapping launches the weights of the next map are on their way while this one still computes, and what is left after the
wait is one load of x, the products and one sum over the program's threads. R rows, N output features, K input features.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import let_next_start_and_wait
from kernels.small_linear.epilogue import load_target, store_target


@triton.jit(do_not_specialize=["R", "num_cells", "num_positions"])
def gemv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    column_sums_ptr,
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
    BN: tl.constexpr,
    BR: tl.constexpr,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    MODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = BN features of BR rows, axes [row, feature, input]. NORM: every program finds mean and 1 / standard
    deviation of its rows itself; in 16 bits from sums of rows less one of their values, in fp32 with the mean taken off
    before squaring, and the product is of rows less their mean."""
    FP32: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, K_PAD)[None, None, :]
    there, live = n < N, r < R
    w = tl.load(w_ptr + n.to(tl.int64)[None, :, None] * K + k, mask=there[None, :, None] & (k < K), other=0)
    if INT8:
        scale = tl.load(scale_ptr + n, mask=there, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=there, other=0.0).to(tl.float32)
    if NORM:
        column_sums = tl.load(column_sums_ptr + n, mask=there, other=0.0)
    let_next_start_and_wait(OVERLAP)
    x_mask = live[:, None, None] & (k < K)
    x = tl.load(x_ptr + r[:, None, None] * K + k, mask=x_mask, other=0.0).to(tl.float32)
    place = (r[:, None], n[None, :], live[:, None])
    before = load_target(out_ptr, rows_ptr, positions_ptr, *place, N, MODE)
    if NORM:
        # Any value of a row is near enough to its mean for 16 bits, and nothing waits for this load.
        shift = tl.load(x_ptr + r * K, mask=live, other=0.0).to(tl.float32)
        if FP32:
            shift = tl.sum(tl.sum(x, 2), 1) / K
        centered = tl.where(k < K, x - shift[:, None, None], 0.0)
        mean = tl.sum(tl.sum(centered, 2), 1) / K  # of what is left of the row
        variance = tl.sum(tl.sum(centered * centered, 2), 1) / K - mean * mean
        rstd = tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # keeps NaN
        if FP32:
            x = centered
        else:
            mean += shift
    y = tl.sum(w.to(tl.float32) * x, 2)
    if INT8:
        y *= scale[None, :]
    if NORM:
        y = (y - column_sums[None, :] * mean[:, None]) * rstd[:, None]
    if BIAS:
        y += bias[None, :]
    store_target(y, *before, *place, out_ptr, cells_ptr, num_cells, num_positions, N, RELU, MODE)
