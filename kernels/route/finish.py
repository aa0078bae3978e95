"""The router behind a map that has multiplied its rows by it (`row_products`). T tokens, D d_model, E experts."""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.route.choice import choose
from kernels.row_statistics import CHUNK as _CHUNK

CHUNK = tl.constexpr(_CHUNK)


@triton.jit(do_not_specialize=["T"])
def finish_route_kernel(
    x_ptr,
    chunks_ptr,
    parts_ptr,
    sums_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    active_ptr,
    out_ptr,
    ids_ptr,
    gates_ptr,
    T,
    eps,
    gate_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS rows a program: their norm by the statistics of their chunks, to out; their logits from parts; their choices. D
    and E are powers of two."""
    CHUNKS: tl.constexpr = D // CHUNK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < T
    d = tl.arange(0, D)
    e = tl.arange(0, E)
    c = tl.arange(0, CHUNKS)
    weight = tl.load(weight_ptr + d).to(tl.float32)
    bias = tl.load(bias_ptr + d).to(tl.float32)
    sums = tl.load(sums_ptr + e)
    shift = tl.load(shift_ptr + e)
    wait_for_inputs(OVERLAP)
    at = rows.to(tl.int64)[:, None]
    means = tl.load(chunks_ptr + at * (2 * CHUNKS) + c[None, :], mask=live[:, None], other=0.0)
    deviations = tl.load(chunks_ptr + at * (2 * CHUNKS) + CHUNKS + c[None, :], mask=live[:, None], other=0.0)
    ptrs = parts_ptr + at * E + e[None, :]
    total = tl.load(ptrs, mask=live[:, None], other=0.0)
    for part in tl.static_range(1, CHUNKS):
        total += tl.load(ptrs + part * (T.to(tl.int64) * E), mask=live[:, None], other=0.0)
    x = tl.load(x_ptr + at * D + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    mean = tl.sum(means, 1) / CHUNKS
    apart = means - mean[:, None]
    variance = (tl.sum(deviations, 1) + CHUNK * tl.sum(apart * apart, 1)) / D
    rstd = tl.rsqrt(variance + eps)
    logits = (total - mean[:, None] * sums[None, :]) * rstd[:, None] + shift[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    choose(logits, rows, live, e, active_ptr, ids_ptr, gates_ptr, gate_scale, E, TOP_K, HAS_ACTIVE, EPS, dtype)
    y = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at * D + d[None, :], y.to(out_ptr.dtype.element_ty), mask=live[:, None])
