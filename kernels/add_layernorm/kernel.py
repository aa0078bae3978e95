"""One program = one row of D features."""

import triton
import triton.language as tl


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
    """residual += sum over slots of delta (fp32, slot order), stored back; out = layer norm of the stored value.
    SLOTS 0: no delta. MASKED: slots whose expert id is negative hold garbage and are not read."""
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(residual_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    if SLOTS > 0:
        total = tl.zeros((D_PAD,), tl.float32)
        for slot in tl.static_range(SLOTS):
            live = mask
            if MASKED:
                live = mask & (tl.load(ids_ptr + row * SLOTS + slot) >= 0)
            total += tl.load(delta_ptr + (row * SLOTS + slot) * D + d, mask=live, other=0.0).to(tl.float32)
        stored = (x + total).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * D + d, stored, mask=mask)
        x = stored.to(tl.float32)
    mean = tl.sum(x, 0) / D
    centered = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centered * centered, 0) / D
    y = centered * tl.rsqrt(variance + eps) * weight + bias
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)
