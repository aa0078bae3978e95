"""One program = one row of D features, or BLOCK features of one."""

import triton
import triton.language as tl

from kernels.dependency import prefetch_piece, wait_for_inputs
from kernels.quantized_rows import SMALLEST
from kernels.row_statistics_kernel import store_chunk_statistics

_SMALLEST = tl.constexpr(SMALLEST)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_TO_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _sum_of_slots(
    delta_ptr,
    ids_ptr,
    row,
    d,
    mask,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sum over slots in fp32, in slot order. MASKED: slots whose expert id is negative hold garbage and do not count; they
    are asked for all the same, since to know first would cost the wait for an id. Nobody reads delta after this."""
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        ptrs = delta_ptr + (row * SLOTS + slot) * D + d
        if EVEN:
            part = tl.load(ptrs, eviction_policy="evict_first").to(tl.float32)
        else:
            part = tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if MASKED:
            part = tl.where(tl.load(ids_ptr + row * SLOTS + slot) >= 0, part, 0.0)
        total += part
    return total


@triton.jit
def _standardised(
    residual_ptr,
    delta_ptr,
    ids_ptr,
    row,
    d,
    mask,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Wait for the row, add its slots and store it back; -> the stored row less its mean, over its standard deviation."""
    SIZE: tl.constexpr = D * residual_ptr.dtype.element_ty.primitive_bitwidth // 8
    prefetch_piece(residual_ptr + row * D, SIZE, OVERLAP)
    if SLOTS > 0:
        prefetch_piece(delta_ptr + row * (SLOTS * D), SLOTS * SIZE, OVERLAP)
    wait_for_inputs(OVERLAP)
    x = tl.load(residual_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    if SLOTS > 0:
        total = _sum_of_slots(delta_ptr, ids_ptr, row, d, mask, D, D == D_PAD, D_PAD, SLOTS, MASKED)
        stored = (x + total).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * D + d, stored, mask=mask)
        x = stored.to(tl.float32)
    mean = tl.sum(x, 0) / D
    centered = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centered * centered, 0) / D
    return centered * tl.rsqrt(variance + eps)


@triton.jit
def add_layernorm_kernel(
    residual_ptr,
    delta_ptr,
    ids_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """residual += sum over slots of delta, stored back; out = layer norm of the stored value. SLOTS 0: no delta."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    y = _standardised(residual_ptr, delta_ptr, ids_ptr, row, d, mask, eps, D, D_PAD, SLOTS, MASKED, OVERLAP) * weight + bias
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_layernorm_int8_kernel(
    residual_ptr,
    delta_ptr,
    ids_ptr,
    weight_ptr,
    bias_ptr,
    codes_ptr,
    scales_ptr,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    AFFINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As `add_layernorm_kernel`, and the normed row leaves in int8 with its scale (AFFINE: times weight, plus bias).

    The largest value is found among the bits of |y|, which order as the values do, with infinity and NaN above them all."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    mask = d < D
    if AFFINE:
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    y = _standardised(residual_ptr, delta_ptr, ids_ptr, row, d, mask, eps, D, D_PAD, SLOTS, MASKED, OVERLAP)
    if AFFINE:
        y = y * weight + bias
    largest_bits = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = largest_bits.to(tl.float32, bitcast=True)
    there = largest >= _SMALLEST
    scale = tl.where(there, largest / 127.0, 1.0)
    inverse = tl.where(there, 127.0 / tl.where(there, largest, 1.0), 1.0)
    tl.store(scales_ptr + row, tl.where(largest_bits < _INFINITY_BITS, scale, float("nan")))
    shifted = y * inverse + _TO_INTEGER  # rounds to the nearest integer, ties to even, and leaves it in the lowest bits
    tl.store(codes_ptr + row * D + d, shifted.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)


@triton.jit
def add_slots_kernel(
    residual_ptr,
    delta_ptr,
    ids_ptr,
    chunks_ptr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    LEAVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """residual += sum over slots of delta, stored back: what `add_layernorm_kernel` does before its norm, same bits. LEAVE:
    statistics of the result's chunks go to chunks."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    if D % BLOCK == 0:
        SIZE: tl.constexpr = BLOCK * residual_ptr.dtype.element_ty.primitive_bitwidth // 8
        prefetch_piece(residual_ptr + row * D + first, SIZE, OVERLAP)
        for slot in tl.static_range(SLOTS):
            prefetch_piece(delta_ptr + (row * SLOTS + slot) * D + first, SIZE, OVERLAP)
    wait_for_inputs(OVERLAP)
    d = first + tl.arange(0, BLOCK)
    mask = d < D
    x = tl.load(residual_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    total = _sum_of_slots(delta_ptr, ids_ptr, row, d, mask, D, D % BLOCK == 0, BLOCK, SLOTS, MASKED)
    stored = (x + total).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + row * D + d, stored, mask=mask)
    if LEAVE:
        store_chunk_statistics(chunks_ptr, row, first, stored.to(tl.float32), D, BLOCK)
