"""Linear map of int8 rows by int8 weights: products summed in int32, then times the scales of row and feature.

R rows, N output features, K input features. MODE: see epilogue.py.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import let_next_start_and_wait
from kernels.small_linear.epilogue import load_target, store_target


@triton.jit(do_not_specialize=["R", "num_cells", "num_positions"])
def int8_rows_kernel(
    x_ptr,
    w_ptr,
    row_scale_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    cells_ptr,
    rows_ptr,
    positions_ptr,
    R,
    num_cells,
    num_positions,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    MODE: tl.constexpr,
    INTEGER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = BN features x BR rows; weights are the wide (M) operand. Without INTEGER the codes are multiplied as
    fp16 and summed in fp32 (exact up to 2^24): Triton has no int8 products below compute capability 8.0."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    live = r < R
    k = tl.arange(0, BK)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    let_next_start_and_wait(OVERLAP)  # all but the weights may have been written by the kernel before
    place = (r[None, :], n[:, None], live[None, :])
    row_scale = tl.load(row_scale_ptr + r, mask=live, other=0.0)
    before = load_target(out_ptr, rows_ptr, positions_ptr, *place, N, MODE)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + r[:, None] * K + k[None, :]
    acc = tl.zeros((BN, BR), tl.int32 if INTEGER else tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        inside = step * BK + k < K
        w = tl.load(w_ptrs + step * BK, mask=(n < N)[:, None] & inside[None, :], other=0)
        x = tl.load(x_ptrs + step * BK, mask=live[:, None] & inside[None, :], other=0)
        if INTEGER:
            acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w.to(tl.float16), tl.trans(x.to(tl.float16)), acc)
    y = acc.to(tl.float32) * row_scale[None, :] * scale[:, None]
    if BIAS:
        y += bias[:, None]
    store_target(y, *before, *place, out_ptr, cells_ptr, num_cells, num_positions, N, RELU, MODE)
