"""Linear map over few rows: weights are the wide (M) operand of each dot, rows the n side.

A layer norm in front is folded into the weights (`folded.py`): the product is of raw rows, and what the norm asks of each
row, y = rstd * (x W'^T - mean * s) + c, is applied to the sums.

R rows, N output features, K input features. MODE: see epilogue.py.
"""

import triton
import triton.language as tl

from kernels.dependency import ask_for_bytes, let_next_start_and_wait
from kernels.small_linear.epilogue import load_target, store_target


@triton.jit
def _add_parts(
    acc,
    row_sum,
    row_squares,
    partial_ptr,
    semaphore_ptr,
    r,
    n,
    live,
    R,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Leave this program's part of a tile; the last one to do so gets the sum of all, in order, and sets the semaphore back.
    Returns whether this is the last one, and the three sums. SUMS: row_sum and row_squares are in parts, too."""
    split = tl.program_id(2)
    mask = live[None, :] & (n < N)[:, None]
    part_ptrs = partial_ptr + r[None, :] * N + n[:, None]
    stride = R.to(tl.int64) * N
    tl.store(part_ptrs + split * stride, acc, mask=mask)
    row_ptrs = partial_ptr + SPLIT * stride + r * 2
    if SUMS:
        tl.store(row_ptrs + split * R * 2, row_sum, mask=live)
        tl.store(row_ptrs + split * R * 2 + 1, row_squares, mask=live)
    tl.debug_barrier()  # every thread's stores come before thread 0's release
    semaphore = semaphore_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    last = tl.atomic_add(semaphore, 1, sem="acq_rel") == SPLIT - 1
    if last:
        acc = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        for part in tl.static_range(1, SPLIT):
            acc += tl.load(part_ptrs + part * stride, mask=mask, other=0.0, cache_modifier=".cg")
        if SUMS:
            row_sum = tl.load(row_ptrs, mask=live, other=0.0, cache_modifier=".cg")
            row_squares = tl.load(row_ptrs + 1, mask=live, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLIT):
                row_sum += tl.load(row_ptrs + part * R * 2, mask=live, other=0.0, cache_modifier=".cg")
                row_squares += tl.load(row_ptrs + part * R * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(semaphore, 0)
    return last, acc, row_sum, row_squares


@triton.jit(do_not_specialize=["R", "num_cells", "num_positions"])
def small_linear_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    column_sums_ptr,
    statistics_ptr,
    out_ptr,
    cells_ptr,
    rows_ptr,
    positions_ptr,
    partial_ptr,
    semaphore_ptr,
    R,
    num_cells,
    num_positions,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    MODE: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = BN features x BR rows x one of SPLIT parts of K. With SPLIT > 1 the last program of a tile adds the
    parts in order (fp32 [SPLIT, R, N]) and leaves the tile's semaphore at zero. NORM 0: none; 1: sums and squares of the
    rows come from the tiles of the product, less a value near the row's mean, so that no digits are lost where the mean is
    large (fp32 [SPLIT, R, 2] after the parts: programs of other features write the same bits there); 2: mean and
    1 / standard deviation are read from statistics [R, 2]; 3: as 1, but by tensor cores (rows times ones, rows times rows)
    and of the rows as they are, for 16 bits. In fp32 the product takes rows less that value too."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row_block = tl.program_id(0)
    n_block = tl.program_id(1)
    split = tl.program_id(2)
    n = n_block * BN + tl.arange(0, BN)
    r = (row_block * BR + tl.arange(0, BR)).to(tl.int64)
    live = r < R
    k = tl.arange(0, BK)
    x_rows = x_ptr + r * K
    if PREFETCH:  # noqa: SIM102 (the outer one is decided while compiling)
        if row_block == 0:
            size: tl.constexpr = 1 if INT8 else 2
            strip = w_ptr + (n_block * BN).to(tl.int64) * K
            ask_for_bytes(strip, tl.minimum(N - n_block * BN, BN) * (K * size))
    if INT8:
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if NORM > 0:
        column_sums = tl.load(column_sums_ptr + n, mask=n < N, other=0.0)
    let_next_start_and_wait(OVERLAP)  # all but the weights may have been written by the kernels before
    place = (r[None, :], n[:, None], live[None, :])
    if SPLIT == 1:
        before = load_target(out_ptr, rows_ptr, positions_ptr, *place, N, MODE)
    FP32: tl.constexpr = dtype == tl.float32
    if NORM == 1:
        if FP32:  # the mean of a row's first features is never further off than a few standard deviations
            near = tl.load(x_rows[None, :] + k[:, None], mask=live[None, :] & (k < K)[:, None], other=0.0)
            shift = tl.sum(near, 0) / min(BK, K)
        else:  # any of its values is near enough for 16 bits, and nothing waits for this load
            shift = tl.load(x_rows, mask=live, other=0.0).to(tl.float32)
        sums = tl.zeros((BK // 8, BR), tl.float32)
        squares = tl.zeros((BK // 8, BR), tl.float32)
    elif NORM == 3:
        ones = tl.full((BK, 16), 1.0, dtype)
        row_sums = tl.zeros((BR, 16), tl.float32)
        gram = tl.zeros((BR, BR), tl.float32)
    elif NORM == 2:
        shift = tl.load(statistics_ptr + r * 2, mask=live, other=0.0)
        rstd = tl.load(statistics_ptr + r * 2 + 1, mask=live, other=0.0)
    STEPS: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT)
    EVEN_K: tl.constexpr = K % (BK * SPLIT) == 0
    first = split * (STEPS * BK)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * K + (first + k)[None, :]
    acc = tl.zeros((BN, BR), dtype=tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        at = first + step * BK + k
        x_mask = live[None, :]
        if EVEN_K and N % BN == 0:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(n < N)[:, None] & (at < K)[None, :], other=0)
        if not EVEN_K:
            x_mask = x_mask & (at < K)[:, None]
        x = tl.load(x_rows[None, :] + at[:, None], mask=x_mask, other=0.0)
        if NORM == 1 or (NORM == 2 and FP32):
            centered = x.to(tl.float32) - shift[None, :]
            if not EVEN_K:
                centered = tl.where((at < K)[:, None], centered, 0.0)
            if NORM == 1:
                lanes = tl.reshape(centered, (BK // 8, 8, BR))  # 8: what one thread loads at once
                sums += tl.sum(lanes, 1)
                squares += tl.sum(lanes * lanes, 1)
            if FP32:
                x = centered
        if NORM == 3:
            row_sums = tl.dot(tl.trans(x), ones, row_sums)
            gram = tl.dot(tl.trans(x), x, gram)
        acc = tl.dot(w.to(dtype), x, acc, input_precision="ieee")
        w_ptrs += BK
    row_sum = 0.0
    row_squares = 0.0
    if NORM == 1:
        row_sum = tl.sum(sums, 0)
        row_squares = tl.sum(squares, 0)
    elif NORM == 3:
        i = tl.arange(0, BR)
        row_sum = tl.sum(row_sums, 1) / 16
        row_squares = tl.sum(tl.where(i[:, None] == i[None, :], gram, 0.0), 1)
    SUMS: tl.constexpr = NORM % 2 == 1
    last = True
    if SPLIT > 1:
        last, acc, row_sum, row_squares = _add_parts(
            acc, row_sum, row_squares, partial_ptr, semaphore_ptr, r, n, live, R, N, SPLIT, SUMS
        )
    if last:
        if SPLIT > 1:
            before = load_target(out_ptr, rows_ptr, positions_ptr, *place, N, MODE)
        y = acc
        if INT8:
            y *= scale[:, None]
        if SUMS:
            mean = row_sum / K  # of what is left of the row
            variance = row_squares / K - mean * mean
            rstd = tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # keeps NaN
            if NORM == 1 and not FP32:
                mean += shift
        elif NORM == 2:
            mean = tl.zeros((BR,), tl.float32) if FP32 else shift
        if NORM > 0:
            y = (y - column_sums[:, None] * mean[None, :]) * rstd[None, :]
        if BIAS:
            y += bias[:, None]
        store_target(y, *before, *place, out_ptr, cells_ptr, num_cells, num_positions, N, RELU, MODE)
