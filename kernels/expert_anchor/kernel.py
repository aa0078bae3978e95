"""Bias and ReLU in one pass. N features, E experts, P rows."""

import triton
import triton.language as tl


@triton.jit
def bias_kernel(rows_ptr, bias_ptr, expert_ptr, N: tl.constexpr, BLOCK: tl.constexpr, RELU: tl.constexpr):
    """rows [P, N] += bias [E, N] of the row's expert, then ReLU if asked; fp32 arithmetic, in place."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + row)
    value = tl.load(rows_ptr + row * N + n, mask=n < N).to(tl.float32)
    value += tl.load(bias_ptr + expert * N + n, mask=n < N).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(rows_ptr + row * N + n, value.to(rows_ptr.dtype.element_ty), mask=n < N)
