"""The products of one tile: BN output features x BT pairs, summed over input features in fp32.

Weights are the wide (M) operand of each dot and are dequantized in registers. Packed ones are int32[E, N/64, K/KB, 64, 32]
(packing.py): one step of one strip of 64 output features is 8 KB in one piece and covers KB = 1024 / BITS input features.
E experts, N output features, K input features.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.expert_gemm.decode import decode4, decode8
from kernels.expert_gemm.dequant import BF16_PRODUCTS

PRODUCTS = tl.constexpr(BF16_PRODUCTS)


@triton.jit
def _join2(a, b, BN: tl.constexpr):
    """Two planes side by side: [BN, 32] x 2 -> [BN, 64]; register moves only."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BN, 64))


@triton.jit
def _join4(a, b, c, d, BN: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 3, 2, 1)), (BN, 128))


@triton.jit
def _x(x_rows, k0, valid, K: tl.constexpr, KX: tl.constexpr, EVEN_K: tl.constexpr):
    """Activations [KX, BT] from input feature k0 on (x_rows: pointers [BT] to it); unused pairs and features past K read as
    zero (never from row 0: one hammered line is 5x slower)."""
    k = tl.arange(0, KX)
    mask = valid[None, :]
    if not EVEN_K:
        mask = mask & ((k0 + k) < K)[:, None]
    return tl.load(x_rows[None, :] + k[:, None], mask=mask, other=0.0)


@triton.jit
def _dot(w, x, acc, IEEE: tl.constexpr):
    """fp32 operands are multiplied as fp32, not as tf32."""
    return tl.dot(w, x, acc, input_precision="ieee" if IEEE else "tf32")


@triton.jit
def _scaled(acc, part, s_ptrs):
    return acc + part * tl.load(s_ptrs).to(tl.float32)[:, None]


@triton.jit
def _two_planes(
    acc,
    a,
    b,
    x_ptrs,
    k0,
    valid,
    K: tl.constexpr,
    BN: tl.constexpr,
    JOIN: tl.constexpr,
    EVEN_K: tl.constexpr,
    IEEE: tl.constexpr,
):
    """acc + two planes times their 64 input features, in one dot or two."""
    if JOIN >= 2:
        acc = _dot(_join2(a, b, BN), _x(x_ptrs, k0, valid, K, 64, EVEN_K), acc, IEEE)
    else:
        acc = _dot(a, _x(x_ptrs, k0, valid, K, 32, EVEN_K), acc, IEEE)
        acc = _dot(b, _x(x_ptrs + 32, k0 + 32, valid, K, 32, EVEN_K), acc, IEEE)
    return acc


@triton.jit
def _four_planes(
    acc,
    a,
    b,
    c,
    d,
    x_ptrs,
    k0,
    valid,
    K: tl.constexpr,
    BN: tl.constexpr,
    JOIN: tl.constexpr,
    EVEN_K: tl.constexpr,
    IEEE: tl.constexpr,
):
    """acc + four planes times their 128 input features, in one, two or four dots."""
    if JOIN == 4:
        acc = _dot(_join4(a, b, c, d, BN), _x(x_ptrs, k0, valid, K, 128, EVEN_K), acc, IEEE)
    else:
        acc = _two_planes(acc, a, b, x_ptrs, k0, valid, K, BN, JOIN, EVEN_K, IEEE)
        acc = _two_planes(acc, c, d, x_ptrs + 64, k0 + 64, valid, K, BN, JOIN, EVEN_K, IEEE)
    return acc


@triton.jit
def _step4(
    acc,
    zero,
    w,
    s_ptrs,
    x_ptrs,
    k0,
    valid,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    JOIN: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc + one step of int4 words: 256 input features, in two halves of four planes. Group scales come after every 64 or
    128 of them, so that products of a group are summed apart (from `zero`)."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    IEEE: tl.constexpr = dtype == tl.float32
    for half in tl.static_range(2):
        a, b, c, d = decode4(w, half, BN, ASM, dtype)
        at = half * 128
        if GROUP == 0:
            acc = _four_planes(acc, a, b, c, d, x_ptrs + at, k0 + at, valid, K, BN, JOIN, EVEN_K, IEEE)
        elif GROUP == 128:
            part = _four_planes(zero, a, b, c, d, x_ptrs + at, k0 + at, valid, K, BN, JOIN, EVEN_K, IEEE)
            acc = _scaled(acc, part, s_ptrs + half * 64)
        else:
            part = _two_planes(zero, a, b, x_ptrs + at, k0 + at, valid, K, BN, 2, EVEN_K, IEEE)
            acc = _scaled(acc, part, s_ptrs + half * 128)
            part = _two_planes(zero, c, d, x_ptrs + at + 64, k0 + at + 64, valid, K, BN, 2, EVEN_K, IEEE)
            acc = _scaled(acc, part, s_ptrs + half * 128 + 64)
    return acc


@triton.jit
def _step8(
    acc,
    zero,
    w,
    s_ptrs,
    x_ptrs,
    k0,
    valid,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    JOIN: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc + one step of int8 words: 128 input features, four planes; JOIN 4: in one dot. Groups as in `_step4`."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    IEEE: tl.constexpr = dtype == tl.float32
    if JOIN == 4:
        a, b = decode8(w, 0, BN, ASM, dtype)
        c, d = decode8(w, 1, BN, ASM, dtype)
        if GROUP == 0:
            acc = _four_planes(acc, a, b, c, d, x_ptrs, k0, valid, K, BN, 4, EVEN_K, IEEE)
        else:
            acc = _scaled(acc, _four_planes(zero, a, b, c, d, x_ptrs, k0, valid, K, BN, 4, EVEN_K, IEEE), s_ptrs)
    else:
        part = zero
        for half in tl.static_range(2):
            a, b = decode8(w, half, BN, ASM, dtype)
            at = half * 64
            if GROUP == 0:
                acc = _two_planes(acc, a, b, x_ptrs + at, k0 + at, valid, K, BN, JOIN, EVEN_K, IEEE)
            elif GROUP == 64:
                part = _two_planes(zero, a, b, x_ptrs + at, k0 + at, valid, K, BN, JOIN, EVEN_K, IEEE)
                acc = _scaled(acc, part, s_ptrs + at)
            else:
                part = _two_planes(part, a, b, x_ptrs + at, k0 + at, valid, K, BN, JOIN, EVEN_K, IEEE)
        if GROUP == 128:
            acc = _scaled(acc, part, s_ptrs)
    return acc


@triton.jit
def accumulate(
    x_ptr,
    x_rows,
    valid,
    w_ptr,
    s_ptr,
    expert,
    n_block,
    first,
    steps,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """sum over k of w[n, k] * x[row, k] for steps [first, first + steps), in fp32 [BN, BT]; per-channel scales are left to
    the caller, group scales are applied here (group by group, in order)."""
    lanes = tl.arange(0, BN)
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    if BITS == 16:
        IEEE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
        KB: tl.constexpr = 64 * JOIN
        EVEN_K: tl.constexpr = K % KB == 0
        k = tl.arange(0, KB)
        n = n_block * BN + lanes
        w_ptrs = w_ptr + (expert * N + n).to(tl.int64)[:, None] * K + (first * KB + k)[None, :]
        x_ptrs = x_ptr + x_rows * K + first * KB
        for step in tl.range(0, steps, num_stages=STAGES):
            if EVEN_K and N % BN == 0:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=(n < N)[:, None] & (((first + step) * KB + k) < K)[None, :], other=0.0)
            acc = _dot(w, _x(x_ptrs, (first + step) * KB, valid, K, KB, EVEN_K), acc, IEEE)
            w_ptrs += KB
            x_ptrs += KB
    else:
        KB: tl.constexpr = 1024 // BITS
        EVEN_K: tl.constexpr = K % KB == 0
        BLOCKS: tl.constexpr = (K + KB - 1) // KB
        STRIPS: tl.constexpr = (N + 63) // 64
        G: tl.constexpr = GROUP if GROUP > 0 else KB
        GROUPS: tl.constexpr = BLOCKS * (KB // G)
        words = tl.arange(0, 32)
        strips = tl.minimum(n_block * (BN // 64) + lanes // 64, STRIPS - 1)
        strip = (expert * STRIPS + strips).to(tl.int64)
        w_ptrs = w_ptr + (strip * BLOCKS + first)[:, None] * 2048 + ((lanes % 64) * 32)[:, None] + words[None, :]
        s_ptrs = s_ptr + (strip * GROUPS + first * (KB // G)) * 64 + lanes % 64
        x_ptrs = x_ptr + x_rows * K + first * KB
        zero = tl.zeros((BN, BT), dtype=tl.float32)
        for step in tl.range(0, steps, num_stages=STAGES):
            w = tl.load(w_ptrs)
            k0 = (first + step) * KB
            if BITS == 4:
                acc = _step4(acc, zero, w, s_ptrs, x_ptrs, k0, valid, K, GROUP, BN, JOIN, EVEN_K, ASM)
            else:
                acc = _step8(acc, zero, w, s_ptrs, x_ptrs, k0, valid, K, GROUP, BN, JOIN, EVEN_K, ASM)
            w_ptrs += 2048
            x_ptrs += KB
            s_ptrs += 64 * (KB // G)
        if ASM and x_ptr.dtype.element_ty == tl.bfloat16:
            acc *= PRODUCTS  # a power of two: exact
    return acc
