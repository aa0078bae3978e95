"""Grouped GEMM over experts: weights are the wide (M) operand of each dot and are dequantized in registers.

T tokens, P = T * TOP_K pairs, E experts, N output features, K input features.
A strip is 64 output features; packed weights are [E, N/64, K/(32*PLANES), 64, 32] int32 (see packing.py), so one
step of one strip is
8 KB in one piece and covers KB = 32 * PLANES input features, PLANES = 32 // BITS. A tile is BN output features x BT
pairs of one expert.
A tile record is int32[4]: expert, first position in expert order, pairs in the tile, 0.
"""

import triton
import triton.language as tl

from kernels.expert_gemm.dequant import dequantize_ptx

# [bits][dtype][half]: A = assembly, C = constraints, B = bf16, H = fp16, 0 = lower planes, 1 = upper planes
A4B0, C4 = (tl.constexpr(s) for s in dequantize_ptx(4, "bf16", 0))
A4B1, _ = (tl.constexpr(s) for s in dequantize_ptx(4, "bf16", 1))
A4H0, _ = (tl.constexpr(s) for s in dequantize_ptx(4, "fp16", 0))
A4H1, _ = (tl.constexpr(s) for s in dequantize_ptx(4, "fp16", 1))
A8B0, C8 = (tl.constexpr(s) for s in dequantize_ptx(8, "bf16", 0))
A8B1, _ = (tl.constexpr(s) for s in dequantize_ptx(8, "bf16", 1))
A8H0, _ = (tl.constexpr(s) for s in dequantize_ptx(8, "fp16", 0))
A8H1, _ = (tl.constexpr(s) for s in dequantize_ptx(8, "fp16", 1))
# One thread asks the copy engine to bring [$1, $1 + $2) bytes into L2; $2 is a multiple of 16.
PREFETCH = tl.constexpr(
    "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}"
)


@triton.jit
def _pair(even, odd, BN: tl.constexpr):
    """Interleave two [BN, 16] halves to [BN, 32]."""
    return tl.reshape(tl.join(even, odd), (BN, 32))


@triton.jit
def _plane(w, shift: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr):
    mask: tl.constexpr = (1 << BITS) - 1
    offset: tl.constexpr = 1 << (BITS - 1)
    even = (w >> shift) & mask
    odd = (w >> (shift + 16)) & mask
    return (_pair(even, odd, BN) - offset).to(dtype)


@triton.jit
def _decode4(w, HALF: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """Planes 4 * HALF to 4 * HALF + 3 of [BN, 32] words: code - 8."""
    if ASM and dtype == tl.float16:
        planes = tl.inline_asm_elementwise(A4H1 if HALF else A4H0, C4, [w], dtype=(tl.float16,) * 4, is_pure=True, pack=2)
    elif ASM:
        planes = tl.inline_asm_elementwise(A4B1 if HALF else A4B0, C4, [w], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2)
    else:
        low, high = tl.split(tl.reshape(w, (BN, 16, 2)))
        half = high if HALF else low
        planes = (
            _plane(half, 0, 4, BN, dtype),
            _plane(half, 4, 4, BN, dtype),
            _plane(half, 8, 4, BN, dtype),
            _plane(half, 12, 4, BN, dtype),
        )
    return planes


@triton.jit
def _decode8(w, HALF: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """Planes 2 * HALF and 2 * HALF + 1 of [BN, 32] words: code - 128."""
    if ASM and dtype == tl.float16:
        planes = tl.inline_asm_elementwise(A8H1 if HALF else A8H0, C8, [w], dtype=(tl.float16,) * 2, is_pure=True, pack=2)
    elif ASM:
        planes = tl.inline_asm_elementwise(A8B1 if HALF else A8B0, C8, [w], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2)
    else:
        low, high = tl.split(tl.reshape(w, (BN, 16, 2)))
        half = high if HALF else low
        planes = (_plane(half, 0, 8, BN, dtype), _plane(half, 8, 8, BN, dtype))
    return planes


@triton.jit
def _join2(a, b, BN: tl.constexpr):
    """Two planes side by side: [BN, 32] x 2 -> [BN, 64]; register moves only."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BN, 64))


@triton.jit
def _join4(a, b, c, d, BN: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 3, 2, 1)), (BN, 128))


@triton.jit
def _x(x_rows, k0, valid, K: tl.constexpr, KX: tl.constexpr, EVEN_K: tl.constexpr):
    """Activations [KX, BT] from input feature k0 on (x_rows: pointers [BT] to it); unused pairs and features past K
    read as zero (never from row 0: one
    hammered line is 5x slower)."""
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
def _half8(
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
def _half4(
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
        acc = _half8(acc, a, b, x_ptrs, k0, valid, K, BN, JOIN, EVEN_K, IEEE)
        acc = _half8(acc, c, d, x_ptrs + 64, k0 + 64, valid, K, BN, JOIN, EVEN_K, IEEE)
    return acc


@triton.jit
def _accumulate(
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
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    IEEE: tl.constexpr = dtype == tl.float32
    lanes = tl.arange(0, BN)
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    if BITS == 16:
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
        PLANES: tl.constexpr = 32 // BITS
        KB: tl.constexpr = 32 * PLANES
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
                d0, d1, d2, d3 = _decode4(w, 0, BN, ASM, dtype)
                if GROUP == 0:
                    acc = _half4(acc, d0, d1, d2, d3, x_ptrs, k0, valid, K, BN, JOIN, EVEN_K, IEEE)
                elif GROUP == 128:
                    acc = _scaled(acc, _half4(zero, d0, d1, d2, d3, x_ptrs, k0, valid, K, BN, JOIN, EVEN_K, IEEE), s_ptrs)
                else:
                    acc = _scaled(acc, _half8(zero, d0, d1, x_ptrs, k0, valid, K, BN, 2, EVEN_K, IEEE), s_ptrs)
                    acc = _scaled(
                        acc, _half8(zero, d2, d3, x_ptrs + 64, k0 + 64, valid, K, BN, 2, EVEN_K, IEEE), s_ptrs + 64
                    )
                d4, d5, d6, d7 = _decode4(w, 1, BN, ASM, dtype)
                if GROUP == 0:
                    acc = _half4(acc, d4, d5, d6, d7, x_ptrs + 128, k0 + 128, valid, K, BN, JOIN, EVEN_K, IEEE)
                elif GROUP == 128:
                    acc = _scaled(
                        acc,
                        _half4(zero, d4, d5, d6, d7, x_ptrs + 128, k0 + 128, valid, K, BN, JOIN, EVEN_K, IEEE),
                        s_ptrs + 64,
                    )
                else:
                    acc = _scaled(
                        acc, _half8(zero, d4, d5, x_ptrs + 128, k0 + 128, valid, K, BN, 2, EVEN_K, IEEE), s_ptrs + 128
                    )
                    acc = _scaled(
                        acc, _half8(zero, d6, d7, x_ptrs + 192, k0 + 192, valid, K, BN, 2, EVEN_K, IEEE), s_ptrs + 192
                    )
            elif JOIN == 4:
                d0, d1 = _decode8(w, 0, BN, ASM, dtype)
                d2, d3 = _decode8(w, 1, BN, ASM, dtype)
                if GROUP == 0:
                    acc = _half4(acc, d0, d1, d2, d3, x_ptrs, k0, valid, K, BN, 4, EVEN_K, IEEE)
                else:
                    acc = _scaled(acc, _half4(zero, d0, d1, d2, d3, x_ptrs, k0, valid, K, BN, 4, EVEN_K, IEEE), s_ptrs)
            else:
                d0, d1 = _decode8(w, 0, BN, ASM, dtype)
                if GROUP == 0:
                    acc = _half8(acc, d0, d1, x_ptrs, k0, valid, K, BN, JOIN, EVEN_K, IEEE)
                else:
                    part = _half8(zero, d0, d1, x_ptrs, k0, valid, K, BN, JOIN, EVEN_K, IEEE)
                    if GROUP == 64:
                        acc = _scaled(acc, part, s_ptrs)
                        part = zero
                d2, d3 = _decode8(w, 1, BN, ASM, dtype)
                if GROUP == 0:
                    acc = _half8(acc, d2, d3, x_ptrs + 64, k0 + 64, valid, K, BN, JOIN, EVEN_K, IEEE)
                else:
                    part = _half8(part, d2, d3, x_ptrs + 64, k0 + 64, valid, K, BN, JOIN, EVEN_K, IEEE)
                    acc = _scaled(acc, part, s_ptrs + (64 if GROUP == 64 else 0))
            w_ptrs += 2048
            x_ptrs += KB
            s_ptrs += 64 * (KB // G)
    return acc


@triton.jit
def _epilogue(
    acc,
    s_ptr,
    b_ptr,
    gate_ptr,
    pairs,
    valid,
    expert,
    n_block,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    RELU: tl.constexpr,
    GATED: tl.constexpr,
):
    """acc [BN, BT] -> scale, bias, ReLU, gate: in this order, fp32."""
    lanes = tl.arange(0, BN)
    n = n_block * BN + lanes
    in_n = n < N
    out = acc
    if BITS < 16 and GROUP == 0:
        out = out * tl.load(s_ptr + expert * N + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out += tl.load(b_ptr + expert * N + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if RELU:
        out = tl.maximum(out, 0.0)
    if GATED:
        out = out * tl.load(gate_ptr + pairs, mask=valid, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def _tile(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    out_ptr,
    expert,
    start,
    count,
    n_block,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    FIRST: tl.constexpr,
    BT: tl.constexpr,
):
    """BN output features of `count` pairs from `start` on in expert order, BT lanes wide."""
    lane = tl.arange(0, BT)
    valid = lane < count
    pairs = tl.load(gather_ptr + start + lane, mask=valid, other=0)
    x_rows = (pairs // TOP_K if FIRST else start + lane).to(tl.int64)
    KB: tl.constexpr = 64 * JOIN if BITS == 16 else 1024 // BITS
    steps: tl.constexpr = (K + KB - 1) // KB
    acc = _accumulate(
        x_ptr, x_rows, valid, w_ptr, s_ptr, expert, n_block, 0, steps, N, K, BITS, GROUP, BN, BT, JOIN, STAGES, ASM
    )
    out = _epilogue(acc, s_ptr, b_ptr, gate_ptr, pairs, valid, expert, n_block, N, BITS, GROUP, BN, FIRST, not FIRST)
    rows = (start + lane if FIRST else pairs).to(tl.int64)
    n = n_block * BN + tl.arange(0, BN)
    tl.store(
        out_ptr + rows[None, :] * N + n[:, None],
        out.to(out_ptr.dtype.element_ty),
        mask=valid[None, :] & (n < N)[:, None],
    )


@triton.jit
def expert_gemm_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    tiles_ptr,
    num_tiles_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    FIRST: tl.constexpr,
    NARROW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = one tile. FIRST: x rows are tokens (gathered), ReLU, out rows in expert order. Else: x rows in expert
    order, gate weight applied, out rows scattered to pair order. A tile of at most NARROW pairs multiplies NARROW lanes, any
    other BT (NARROW 0: all tiles)."""
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_block = tl.program_id(0)
    tile = tl.program_id(1)
    if tile < tl.load(num_tiles_ptr):
        expert = tl.load(tiles_ptr + tile * 4)
        start = tl.load(tiles_ptr + tile * 4 + 1)
        count = tl.load(tiles_ptr + tile * 4 + 2)
        of_tile = (x_ptr, w_ptr, s_ptr, b_ptr, gate_ptr, gather_ptr, out_ptr, expert, start, count, n_block)
        if NARROW > 0 and count <= NARROW:
            _tile(*of_tile, N, K, TOP_K, BITS, GROUP, BN, JOIN, STAGES, ASM, FIRST, NARROW)
        else:
            _tile(*of_tile, N, K, TOP_K, BITS, GROUP, BN, JOIN, STAGES, ASM, FIRST, BT)


@triton.jit
def _prefetch(
    w_ptr,
    expert,
    n_block,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Ask for one item's weights in L2: one thread, one instruction per unbroken run of memory."""
    if BITS == 16:
        if SPLIT == 1:
            address = (w_ptr + (expert * N + n_block * BN).to(tl.int64) * K).to(tl.int64)
            tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, BN * K * 2], dtype=tl.int32, is_pure=False, pack=1)
    else:
        BLOCKS: tl.constexpr = (K + 1024 // BITS - 1) // (1024 // BITS)
        strip = (expert * (N // 64) + n_block * (BN // 64)).to(tl.int64)
        if SPLIT == 1:
            address = (w_ptr + strip * BLOCKS * 2048).to(tl.int64)
            tl.inline_asm_elementwise(
                PREFETCH, "=r,l,r", [address, (BN // 64) * BLOCKS * 8192], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            for part in tl.static_range(BN // 64):
                address = (w_ptr + ((strip + part) * BLOCKS + first) * 2048).to(tl.int64)
                tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, STEPS * 8192], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _item_expert(tiles_ptr, item, num_first, num_items, PER_TILE1: tl.constexpr, PER_TILE2: tl.constexpr):
    """Expert of a work item; items [0, num_first) are of the first GEMM, the rest of the second."""
    tile = tl.where(item < num_first, item // PER_TILE1, (item - num_first) // PER_TILE2)
    return tl.load(tiles_ptr + tile * 4, mask=item < num_items, other=0)


@triton.jit(do_not_specialize=["num_pairs", "max_tiles"])
def expert_ffn_kernel(
    x_ptr,
    w1_ptr,
    s1_ptr,
    b1_ptr,
    w2_ptr,
    s2_ptr,
    b2_ptr,
    gate_ptr,
    gather_ptr,
    tiles_ptr,
    num_tiles_ptr,
    hidden_ptr,
    out_ptr,
    partial_ptr,
    sync_ptr,
    num_pairs,
    max_tiles,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN1: tl.constexpr,
    BN2: tl.constexpr,
    BT: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PREFETCH: tl.constexpr,
    DYNAMIC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Both GEMMs of the expert FFN in one launch, so that weights stream without a gap between them.

    Work items in order: (tile, n block) of the first GEMM, then (tile, n block, k split) of the second. A program
    takes items
    pid, pid + G, ... (all G programs must be resident: cooperative launch) or, DYNAMIC, the next number of a ticket counter.
    An item of the second GEMM waits until its tile's counter says that the first GEMM's n blocks are all written;
    items of the
    first never wait, so the order cannot deadlock. The last program to finish a k split adds the parts in split order.
    sync int32, zeroed by the router before every launch: [ticket, 0, 0, 0, tile counters[max_tiles], split counters].
    hidden [P, F] in expert order; out [P, D] in pair order; partial fp32 [SPLIT, P, D] in expert order.
    """
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    NB1: tl.constexpr = (F + BN1 - 1) // BN1
    NB2: tl.constexpr = (D + BN2 - 1) // BN2
    KB: tl.constexpr = 64 * JOIN if BITS == 16 else 1024 // BITS
    STEPS1: tl.constexpr = (D + KB - 1) // KB
    STEPS2: tl.constexpr = (F + KB - 1) // KB // SPLIT
    PER2: tl.constexpr = NB2 * SPLIT
    num_tiles = tl.load(num_tiles_ptr)
    num_first = num_tiles * NB1
    num_items = num_first + num_tiles * PER2
    ready_ptr = sync_ptr + 4
    split_ptr = sync_ptr + 4 + max_tiles
    lane = tl.arange(0, BT)
    item = tl.atomic_add(sync_ptr, 1, sem="relaxed") if DYNAMIC else tl.program_id(0)
    ahead = item + tl.num_programs(0)
    if PREFETCH:
        expert_ahead = _item_expert(tiles_ptr, ahead, num_first, num_items, NB1, PER2)
        if item >= num_first and item < num_items:
            own = item - num_first
            _prefetch(
                w2_ptr,
                _item_expert(tiles_ptr, item, num_first, num_items, NB1, PER2),
                own % PER2 // SPLIT,
                own % SPLIT * STEPS2,
                D,
                F,
                BITS,
                BN2,
                STEPS2,
                SPLIT,
            )

    while item < num_first:
        n_block = item % NB1
        tile = item // NB1
        expert = tl.load(tiles_ptr + tile * 4)
        start = tl.load(tiles_ptr + tile * 4 + 1)
        count = tl.load(tiles_ptr + tile * 4 + 2)
        if PREFETCH:
            if ahead < num_first:
                _prefetch(w1_ptr, expert_ahead, ahead % NB1, 0, F, D, BITS, BN1, STEPS1, 1)
            elif ahead < num_items:
                then = ahead - num_first
                _prefetch(w2_ptr, expert_ahead, then % PER2 // SPLIT, then % SPLIT * STEPS2, D, F, BITS, BN2, STEPS2, SPLIT)
            expert_ahead = _item_expert(tiles_ptr, ahead + tl.num_programs(0), num_first, num_items, NB1, PER2)
        valid = lane < count
        pairs = tl.load(gather_ptr + start + lane, mask=valid, other=0)
        rows = (pairs // TOP_K).to(tl.int64)
        acc = _accumulate(
            x_ptr, rows, valid, w1_ptr, s1_ptr, expert, n_block, 0, STEPS1, F, D, BITS, GROUP, BN1, BT, JOIN, STAGES, ASM
        )
        h = _epilogue(acc, s1_ptr, b1_ptr, gate_ptr, pairs, valid, expert, n_block, F, BITS, GROUP, BN1, True, False)
        n = n_block * BN1 + tl.arange(0, BN1)
        tl.store(
            hidden_ptr + (start + lane).to(tl.int64)[None, :] * F + n[:, None],
            h.to(hidden_ptr.dtype.element_ty),
            mask=valid[None, :] & (n < F)[:, None],
        )
        tl.debug_barrier()  # every thread's stores come before thread 0's release
        tl.atomic_add(ready_ptr + tile, 1, sem="release")
        if DYNAMIC:
            item = tl.atomic_add(sync_ptr, 1, sem="relaxed")
        else:
            item = ahead
            ahead += tl.num_programs(0)

    while item < num_items:
        own = item - num_first
        tile = own // PER2
        n_block = own % PER2 // SPLIT
        split = own % SPLIT
        expert = tl.load(tiles_ptr + tile * 4)
        start = tl.load(tiles_ptr + tile * 4 + 1)
        count = tl.load(tiles_ptr + tile * 4 + 2)
        if PREFETCH:
            if ahead < num_items:
                then = ahead - num_first
                _prefetch(w2_ptr, expert_ahead, then % PER2 // SPLIT, then % SPLIT * STEPS2, D, F, BITS, BN2, STEPS2, SPLIT)
            expert_ahead = _item_expert(tiles_ptr, ahead + tl.num_programs(0), num_first, num_items, NB1, PER2)
        valid = lane < count
        pairs = tl.load(gather_ptr + start + lane, mask=valid, other=0)
        rows = (start + lane).to(tl.int64)
        n = n_block * BN2 + tl.arange(0, BN2)
        mask = valid[None, :] & (n < D)[:, None]
        while tl.atomic_add(ready_ptr + tile, 0, sem="acquire") < NB1:
            pass
        acc = _accumulate(
            hidden_ptr,
            rows,
            valid,
            w2_ptr,
            s2_ptr,
            expert,
            n_block,
            split * STEPS2,
            STEPS2,
            D,
            F,
            BITS,
            GROUP,
            BN2,
            BT,
            JOIN,
            STAGES,
            ASM,
        )
        out_ptrs = out_ptr + pairs.to(tl.int64)[None, :] * D + n[:, None]
        if SPLIT == 1:
            y = _epilogue(acc, s2_ptr, b2_ptr, gate_ptr, pairs, valid, expert, n_block, D, BITS, GROUP, BN2, False, True)
            tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            part_ptrs = partial_ptr + rows[None, :] * D + n[:, None]
            stride = num_pairs.to(tl.int64) * D
            tl.store(part_ptrs + split * stride, acc, mask=mask)
            tl.debug_barrier()
            finished = tl.atomic_add(split_ptr + tile * NB2 + n_block, 1, sem="acq_rel")
            if finished == SPLIT - 1:
                total = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                for part in tl.static_range(1, SPLIT):
                    total += tl.load(part_ptrs + part * stride, mask=mask, other=0.0, cache_modifier=".cg")
                y = _epilogue(
                    total, s2_ptr, b2_ptr, gate_ptr, pairs, valid, expert, n_block, D, BITS, GROUP, BN2, False, True
                )
                tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
        if DYNAMIC:
            item = tl.atomic_add(sync_ptr, 1, sem="relaxed")
        else:
            item = ahead
            ahead += tl.num_programs(0)
