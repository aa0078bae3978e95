"""One program = one row of D features, or BLOCK features of one."""

import triton
import triton.language as tl

from kernels.dependency import prefetch_piece, wait_for_inputs


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
    y = centered * tl.rsqrt(variance + eps) * weight + bias
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_slots_kernel(
    residual_ptr,
    delta_ptr,
    ids_ptr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """residual += sum over slots of delta, stored back: what `add_layernorm_kernel` does before its norm, same bits."""
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
    tl.store(residual_ptr + row * D + d, (x + total).to(residual_ptr.dtype.element_ty), mask=mask)
