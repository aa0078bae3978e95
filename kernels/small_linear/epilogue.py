"""What the kernels of a linear map share: where results go.

MODE 0: out [R, N]; 1: out is the residual, added to in place; 2: queries [R, N/3] to out, keys and values into the cache
cells [cells, positions, 2, N/3].
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def load_target(out_ptr, rows_ptr, positions_ptr, r, n, live, N: tl.constexpr, MODE: tl.constexpr):
    """(residual, cache row, position) of rows r and features n, as far as MODE needs them: loaded before the products, so
    that nothing waits for them. r, n and live broadcast to the tile's shape."""
    old = tl.zeros((1, 1), tl.float32)
    row = tl.zeros((1, 1), tl.int32)
    position = tl.zeros((1, 1), tl.int32)
    if MODE == 1:
        old = tl.load(out_ptr + r * N + n, mask=live & (n < N), other=0.0)
    if MODE == 2:
        row = tl.load(rows_ptr + r, mask=live, other=-1)
        position = tl.load(positions_ptr + r, mask=live, other=-1)
    return old, row, position


@triton.jit
def store_target(
    y,
    old,
    row,
    position,
    r,
    n,
    live,
    out_ptr,
    cells_ptr,
    num_cells,
    num_positions,
    N: tl.constexpr,
    RELU: tl.constexpr,
    MODE: tl.constexpr,
):
    """ReLU, residual, store of y (fp32); in fp16 what would round to +-inf becomes +-(65504 - 1000), as NLLB clamps."""
    mask = live & (n < N)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, as torch does
    if MODE == 1:
        y += old.to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if dtype == tl.float16:
        y = tl.where(y >= 65520.0, 64504.0, tl.where(y <= -65520.0, -64504.0, y))
    done = y.to(dtype)
    if MODE < 2:
        tl.store(out_ptr + r * N + n, done, mask=mask)
    else:
        D: tl.constexpr = N // 3
        tl.store(out_ptr + r * D + n, done, mask=mask & (n < D))
        inside = (row >= 0) & (row < num_cells) & (position >= 0) & (position < num_positions)
        cell = row.to(tl.int64) * num_positions + position
        tl.store(cells_ptr + cell * (2 * D) + (n - D), done, mask=mask & inside & (n >= D))
