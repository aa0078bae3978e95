"""Both GEMMs of the expert FFN for many tokens: one persistent launch, decoding overlapped with the tensor cores.

T tokens, P = T * TOP_K pairs, D d_model, F d_ff. A tile is BN output features x BT pairs of one expert, as in ../kernel.py,
and packed weights are the same (../packing.py). What differs is the schedule, which Triton's own compiler does not give to a
dot with a register operand (it waits after each one): here one dot is always in flight while the next operand is decoded.

K is cut into *steps* of KB = 1024 / BITS input features (one 8 KB block of each strip) and steps into *chunks* of 64.
Weights wait in a ring of W_STEPS steps, activations in rings of X_STEPS steps, one for each chunk of a step: the compiler
puts a barrier between any two accesses of one buffer, whatever the index. At chunk c the program
  1. waits until the copies of c have arrived and every warp is done with c - 2,
  2. refills the buffer of c - 2 (X_STEPS steps ahead) and, at c = 1, that of this step's weights, by then in registers,
     W_STEPS >= X_STEPS, so that weights copied with an older chunk than c have arrived when c has,
  3. decodes 64 input features for each half of its output features and issues their dots; the wait after a dot is for the
     one before it.
The rings run on from one tile into the next, so a tile starts with its operands in place.
Items of the second GEMM wait for their tile's counter. All programs must be resident (cooperative launch); a program begins
the second GEMM after its own items of the first, so that nobody waits for anybody who waits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.expert_gemm.dequant import dequantize_ptx

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


def _chunk(bits, dtype, chunk):
    """Assembly that decodes the two planes of chunk `chunk`."""
    half, first = (chunk, 0) if bits == 8 else (chunk // 2, chunk % 2 * 2)
    return gl.constexpr(dequantize_ptx(bits, dtype, half, first, 2)[0])


# [bits][dtype][chunk]: B = bf16, H = fp16
A4B0, A4B1, A4B2, A4B3 = (_chunk(4, "bf16", c) for c in range(4))
A4H0, A4H1, A4H2, A4H3 = (_chunk(4, "fp16", c) for c in range(4))
A8B0, A8B1 = (_chunk(8, "bf16", c) for c in range(2))
A8H0, A8H1 = (_chunk(8, "fp16", c) for c in range(2))
CONSTRAINTS = gl.constexpr("=&r,=&r,r,r")


@gluon.jit
def _decode(words, CHUNK: gl.constexpr, BITS: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr, A: gl.constexpr):
    """Words [ROWS, 32] of a step -> codes minus their offset of chunk CHUNK: [ROWS, 64], in the registers of a dot."""
    low, high = gl.split(gl.reshape(words, (ROWS, 16, 2)))  # only the word that holds the chunk stays alive
    word = high if CHUNK >= 8 // BITS else low
    pair = gl.convert_layout(gl.reshape(gl.join(word, word), (ROWS, 32)), A, assert_trivial=True)
    if BITS == 4 and dtype == gl.bfloat16:
        asm: gl.constexpr = A4B0 if CHUNK == 0 else (A4B1 if CHUNK == 1 else (A4B2 if CHUNK == 2 else A4B3))
    elif BITS == 4:
        asm: gl.constexpr = A4H0 if CHUNK == 0 else (A4H1 if CHUNK == 1 else (A4H2 if CHUNK == 2 else A4H3))
    elif dtype == gl.bfloat16:
        asm: gl.constexpr = A8B0 if CHUNK == 0 else A8B1
    else:
        asm: gl.constexpr = A8H0 if CHUNK == 0 else A8H1
    if dtype == gl.bfloat16:
        a, b = gl.inline_asm_elementwise(asm, CONSTRAINTS, [pair], dtype=(gl.bfloat16,) * 2, is_pure=True, pack=2)
    else:
        a, b = gl.inline_asm_elementwise(asm, CONSTRAINTS, [pair], dtype=(gl.float16,) * 2, is_pure=True, pack=2)
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), (ROWS, 64)), A, assert_trivial=True)


@gluon.jit
def _rows(
    item,
    num_items,
    tiles_ptr,
    gather_ptr,
    lane,
    BLOCKS_N: gl.constexpr,
    FIRST: gl.constexpr,
    TOP_K: gl.constexpr,
    STRIPS: gl.constexpr,
    TILE_STRIPS: gl.constexpr,
):
    """Rows of x that an item multiplies, how many, and its first strip of weights; no rows where there is no such item."""
    there = item < num_items
    tile = item // BLOCKS_N
    expert = gl.load(tiles_ptr + tile * 4, mask=there, other=0)
    start = gl.load(tiles_ptr + tile * 4 + 1, mask=there, other=0)
    count = gl.load(tiles_ptr + tile * 4 + 2, mask=there, other=0)
    rows = gl.load(gather_ptr + start + lane, mask=lane < count, other=0) // TOP_K if FIRST else start + lane
    return rows, count, expert * STRIPS + item % BLOCKS_N * TILE_STRIPS


@gluon.jit
def _copy_x(buffer, x_ptr, rows, count, k, lane, column, K: gl.constexpr):
    """Start copying x[rows, k : k + 64] to a buffer [BT, 64]; rows past `count` become zero."""
    pointers = x_ptr + (rows * K + k)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=(lane < count)[:, None] & (column >= 0)[None, :])


@gluon.jit
def _copy_w(
    buffers,
    slot,
    w_ptr,
    strip,
    step,
    there,
    STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Start copying one step of an item's strips to slot `slot` of the ring [W_STEPS * HALVES, ROWS, 32]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    offsets = (row // 64) * (STEPS * 2048) + (row % 64) * 32
    mask = ((row >= 0) & there)[:, None] & (word >= 0)[None, :]
    for half in gl.static_range(HALVES):
        first = (strip + half * (ROWS // 64)).to(gl.int64) * (STEPS * 2048) + step * 2048
        pointers = w_ptr + first + offsets[:, None] + word[None, :]
        async_copy.async_copy_global_to_shared(buffers.index(slot * HALVES + half), pointers, mask=mask)


@gluon.jit
def _write(
    acc,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    out_ptr,
    expert,
    start,
    count,
    n0,
    N: gl.constexpr,
    ROWS: gl.constexpr,
    BT: gl.constexpr,
    FIRST: gl.constexpr,
    ACC: gl.constexpr,
    WARPS: gl.constexpr,
):
    """acc [ROWS, BT] -> scale, bias, then ReLU and rows in expert order (FIRST), or gate and rows in pair order."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])  # 128 neighbouring bytes a row
    n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    scale = gl.load(s_ptr + expert * N + n).to(gl.float32)
    bias = gl.load(b_ptr + expert * N + n).to(gl.float32)
    y = acc * scale[:, None] + bias[:, None]
    if FIRST:
        y = gl.maximum(y, 0.0)
    else:
        column = gl.arange(0, BT, gl.SliceLayout(0, ACC))
        pairs = gl.load(gather_ptr + start + column, mask=column < count, other=0)
        y = y * gl.load(gate_ptr + pairs, mask=column < count, other=0.0).to(gl.float32)[None, :]
    y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), LAYOUT)
    lane = gl.arange(0, BT, gl.SliceLayout(0, LAYOUT))
    rows = start + lane if FIRST else gl.load(gather_ptr + start + lane, mask=lane < count, other=0)
    m = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    gl.store(out_ptr + rows.to(gl.int64)[None, :] * N + m[:, None], y, mask=(lane < count)[None, :] & (m >= 0)[:, None])


@gluon.jit
def _wait_ready(ready_ptr, item, num_items, BLOCKS_N: gl.constexpr, TARGET: gl.constexpr):
    """Wait until all blocks of the first GEMM of the item's tile are written."""
    if item < num_items:
        while gl.atomic_add(ready_ptr + item // BLOCKS_N, 0, sem="acquire") < TARGET:
            pass


@gluon.jit
def _gemm(
    item,
    num_items,
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    tiles_ptr,
    out_ptr,
    ready_ptr,
    w_ring,
    x_rings,
    turn,
    N: gl.constexpr,
    K: gl.constexpr,
    TOP_K: gl.constexpr,
    BITS: gl.constexpr,
    HALVES: gl.constexpr,
    BT: gl.constexpr,
    W_STEPS: gl.constexpr,
    X_STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    FIRST: gl.constexpr,
    TARGET: gl.constexpr,
):
    """Items item, item + programs, ... of one GEMM; returns the next item and the steps the rings have made so far."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS  # output features of one dot
    KB: gl.constexpr = 1024 // BITS
    CHUNKS: gl.constexpr = KB // 64
    STEPS: gl.constexpr = K // KB
    STRIPS: gl.constexpr = N // 64
    TILE_STRIPS: gl.constexpr = HALVES * ROWS // 64
    BLOCKS_N: gl.constexpr = STRIPS // TILE_STRIPS
    AHEAD: gl.constexpr = X_STEPS * CHUNKS - 2  # chunks in flight, each with a copy group of its own
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BT, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    lane = gl.arange(0, BT, gl.SliceLayout(1, COPY))
    column = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    programs = gl.num_programs(0)
    if not FIRST:
        _wait_ready(ready_ptr, item, num_items, BLOCKS_N, TARGET)
    rows, count, strip = _rows(item, num_items, tiles_ptr, gather_ptr, lane, BLOCKS_N, FIRST, TOP_K, STRIPS, TILE_STRIPS)
    for q in gl.static_range(AHEAD):
        if q < W_STEPS:
            _copy_w(w_ring, (turn + q) % W_STEPS, w_ptr, strip, q, item < num_items, STEPS, ROWS, HALVES, WARPS)
        if q == AHEAD - 1:
            for more in gl.static_range(AHEAD, W_STEPS):
                _copy_w(w_ring, (turn + more) % W_STEPS, w_ptr, strip, more, item < num_items, STEPS, ROWS, HALVES, WARPS)
        _copy_x(x_rings[q % CHUNKS].index((turn + q // CHUNKS) % X_STEPS), x_ptr, rows, count, q * 64, lane, column, K)
        async_copy.commit_group()
    copy_rows = rows
    copy_count = count
    copy_k = (X_STEPS - 1) * KB
    while item < num_items:
        if not FIRST:
            _wait_ready(ready_ptr, item + programs, num_items, BLOCKS_N, TARGET)
        next_rows, next_count, next_strip = _rows(
            item + programs, num_items, tiles_ptr, gather_ptr, lane, BLOCKS_N, FIRST, TOP_K, STRIPS, TILE_STRIPS
        )
        acc0 = warpgroup_mma_init(gl.zeros((ROWS, BT), gl.float32, ACC))
        acc1 = warpgroup_mma_init(gl.zeros((ROWS, BT), gl.float32, ACC))
        for step in range(STEPS):
            w_slot = turn % W_STEPS
            x_slot = turn % X_STEPS
            x_before = (turn + X_STEPS - 1) % X_STEPS
            turn += 1
            for c in gl.static_range(CHUNKS):
                async_copy.wait_group(AHEAD - 1)
                barrier()
                fence_async_shared()
                if c < 2:
                    buffer = x_rings[CHUNKS - 2 + c].index(x_before)
                    _copy_x(buffer, x_ptr, copy_rows, copy_count, copy_k + (CHUNKS - 2 + c) * 64, lane, column, K)
                else:
                    buffer = x_rings[c - 2].index(x_slot)
                    _copy_x(buffer, x_ptr, copy_rows, copy_count, copy_k + (c - 2) * 64, lane, column, K)
                if c == 0:
                    words0 = w_ring.index(w_slot * HALVES).load(A)
                    if HALVES == 2:
                        words1 = w_ring.index(w_slot * HALVES + 1).load(A)
                if c == 1:
                    same = step + X_STEPS < STEPS
                    copy_k = gl.where(same, step + X_STEPS, step + X_STEPS - STEPS) * KB
                    copy_rows = gl.where(same, rows, next_rows)
                    copy_count = gl.where(same, count, next_count)
                    same = step + W_STEPS < STEPS
                    w_strip = gl.where(same, strip, next_strip)
                    w_step = gl.where(same, step + W_STEPS, step + W_STEPS - STEPS)
                    _copy_w(w_ring, w_slot, w_ptr, w_strip, w_step, same | (next_count > 0), STEPS, ROWS, HALVES, WARPS)
                async_copy.commit_group()
                x = x_rings[c].index(x_slot).permute((1, 0))
                acc0 = warpgroup_mma(_decode(words0, c, BITS, ROWS, dtype, A), x, acc0, is_async=True)
                if HALVES == 2:
                    acc1 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc1]))
                    acc1 = warpgroup_mma(_decode(words1, c, BITS, ROWS, dtype, A), x, acc1, is_async=True)
                acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
        tile = item // BLOCKS_N
        expert = gl.load(tiles_ptr + tile * 4)
        start = gl.load(tiles_ptr + tile * 4 + 1)
        n0 = item % BLOCKS_N * (HALVES * ROWS)
        done = warpgroup_mma_wait(HALVES - 1, deps=[acc0])
        _write(done, s_ptr, b_ptr, gate_ptr, gather_ptr, out_ptr, expert, start, count, n0, N, ROWS, BT, FIRST, ACC, WARPS)
        if HALVES == 2:
            n0 += ROWS
            done = warpgroup_mma_wait(0, deps=[acc1])
            _write(
                done, s_ptr, b_ptr, gate_ptr, gather_ptr, out_ptr, expert, start, count, n0, N, ROWS, BT, FIRST, ACC, WARPS
            )
        if FIRST:
            barrier()  # every thread's stores come before the release
            gl.atomic_add(ready_ptr + tile, 1, sem="release")
        item += programs
        rows = next_rows
        count = next_count
        strip = next_strip
    async_copy.wait_group(0)
    barrier()
    return item, turn


@gluon.jit
def expert_ffn_pipelined_kernel(
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
    sync_ptr,
    D: gl.constexpr,
    F: gl.constexpr,
    TOP_K: gl.constexpr,
    BITS: gl.constexpr,
    BN1: gl.constexpr,
    BN2: gl.constexpr,
    BT: gl.constexpr,
    W_STEPS: gl.constexpr,
    X_STEPS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """relu(x W1^T + b1) W2^T + b2 times the gate: hidden [P, F] in expert order, out [P, D] in pair order.

    Items: (tile, n block) of the first GEMM, then of the second. sync as in `expert_ffn_kernel`: zeroed by the router, tile
    counters from word 4 on. BN1, BN2: 16 or 32 features a warp.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS
    HALVES1: gl.constexpr = BN1 // ROWS
    HALVES2: gl.constexpr = BN2 // ROWS
    SLOTS: gl.constexpr = W_STEPS * (HALVES1 if HALVES1 > HALVES2 else HALVES2)
    w_ring = gl.allocate_shared_memory(gl.int32, [SLOTS, ROWS, 32], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x0 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
    x1 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
    if BITS == 4:
        x2 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
        x3 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
        x_rings = (x0, x1, x2, x3)
    else:
        x_rings = (x0, x1)
    num_tiles = gl.load(num_tiles_ptr)
    num_first = num_tiles * (F // BN1)
    item, turn = _gemm(
        gl.program_id(0),
        num_first,
        x_ptr,
        w1_ptr,
        s1_ptr,
        b1_ptr,
        gate_ptr,
        gather_ptr,
        tiles_ptr,
        hidden_ptr,
        sync_ptr + 4,
        w_ring,
        x_rings,
        gl.to_tensor(0),
        F,
        D,
        TOP_K,
        BITS,
        HALVES1,
        BT,
        W_STEPS,
        X_STEPS,
        WARPS,
        True,
        F // BN1,
    )
    _gemm(
        item - num_first,
        num_tiles * (D // BN2),
        hidden_ptr,
        w2_ptr,
        s2_ptr,
        b2_ptr,
        gate_ptr,
        gather_ptr,
        tiles_ptr,
        out_ptr,
        sync_ptr + 4,
        w_ring,
        x_rings,
        turn,
        D,
        F,
        TOP_K,
        BITS,
        HALVES2,
        BT,
        W_STEPS,
        X_STEPS,
        WARPS,
        False,
        F // BN1,
    )
