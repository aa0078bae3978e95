"""One program = BLOCK features of one token."""

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.row_statistics_kernel import store_chunk_statistics


@triton.jit(do_not_specialize=["V", "P", "pad"])
def embed_kernel(
    ids_ptr,
    positions_ptr,
    table_ptr,
    position_table_ptr,
    out_ptr,
    chunks_ptr,
    scale,
    V,
    P,
    pad,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    GIVEN_ROWS: tl.constexpr,
    LEAVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """GIVEN_ROWS: positions_ptr holds rows of the position table; else positions from 0. Compiled without fused
    multiply-add, since torch rounds the product before it adds. LEAVE: statistics of the result's chunks go to chunks."""
    wait_for_inputs(OVERLAP)
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + r).to(tl.int64)
    row = tl.load(positions_ptr + r).to(tl.int64)
    if not GIVEN_ROWS:
        row = tl.where(token == pad, pad, row + 1 + pad)
    in_d = d < D
    x = tl.load(table_ptr + token * D + d, mask=in_d & (token >= 0) & (token < V), other=0.0)
    position = tl.load(position_table_ptr + row * D + d, mask=in_d & (row >= 0) & (row < P), other=0.0)
    scaled = (x.to(tl.float32) * scale).to(dtype)
    out = (scaled.to(tl.float32) + position.to(tl.float32)).to(dtype)
    tl.store(out_ptr + r * D + d, out, mask=in_d)
    if LEAVE:
        store_chunk_statistics(chunks_ptr, r, tl.program_id(1) * BLOCK, out.to(tl.float32), D, BLOCK)
