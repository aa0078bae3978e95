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
Where three steps of x fit (X_STEPS > 2; int4, whose steps have four chunks), 1 and 2 are done once a step: two barriers and
one fence instead of four.
The rings run on from one tile into the next, so a tile starts with its operands in place; those of weights from the first
GEMM into the second, too, where both take as many features a tile. What a tile needs at its end (scales, biases, gates) is
asked for at its start: memory is a thousand cycles away, and then nothing else would hide them.
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

from kernels.dependency import wait_for_inputs
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
def _entry(item, num_items, tiles_ptr, BLOCKS_N: gl.constexpr):
    """Expert, first position in expert order and pairs of an item's tile; no pairs where there is no such item."""
    there = item < num_items
    tile_ptr = tiles_ptr + item // BLOCKS_N * 4
    expert = gl.load(tile_ptr, mask=there, other=0)
    return expert, gl.load(tile_ptr + 1, mask=there, other=0), gl.load(tile_ptr + 2, mask=there, other=0)


@gluon.jit
def _rows(start, count, gather_ptr, lane, FIRST: gl.constexpr):
    """Rows of x that a tile multiplies, times TOP_K in the first GEMM: who divides them waits until they are there."""
    return gl.load(gather_ptr + start + lane, mask=lane < count, other=0) if FIRST else start + lane


@gluon.jit
def _weights(w_ptr, expert, block, STRIPS: gl.constexpr, TILE_STRIPS: gl.constexpr, STRIDE: gl.constexpr):
    """Where the strips of an expert's block of output features begin; a strip holds STRIDE words."""
    return w_ptr + (expert * STRIPS + block * TILE_STRIPS).to(gl.int64) * STRIDE


@gluon.jit
def _copy_x(buffer, x_ptr, rows, count, k, lane, column, K: gl.constexpr):
    """Start copying x[rows, k : k + 64] to a buffer [BT, 64]; rows past `count` become zero."""
    pointers = x_ptr + (rows * K + k)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=(lane < count)[:, None] & (column >= 0)[None, :])


@gluon.jit
def _copy_w(buffers, slot, first, stride, there, ROWS: gl.constexpr, HALVES: gl.constexpr, WARPS: gl.constexpr):
    """Start copying one step of an item's strips to slot `slot` of the ring [W_STEPS * HALVES, ROWS, 32]; `first` is that
    step of the first strip, `stride` the words from a strip to the next."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    offsets = (row // 64) * stride + (row % 64) * 32
    mask = ((row >= 0) & there)[:, None] & (word >= 0)[None, :]
    for half in gl.static_range(HALVES):
        pointers = first + half * (ROWS // 64) * stride + offsets[:, None] + word[None, :]
        async_copy.async_copy_global_to_shared(buffers.index(slot * HALVES + half), pointers, mask=mask)


@gluon.jit
def _scale_and_bias(s_ptr, b_ptr, expert, n0, N: gl.constexpr, ROWS: gl.constexpr, ACC: gl.constexpr):
    """Those of ROWS features of an expert from n0 on, as they lie in memory."""
    n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    return gl.load(s_ptr + expert * N + n), gl.load(b_ptr + expert * N + n)


@gluon.jit
def _gates_and_rows(gather_ptr, gate_ptr, start, count, WIDTH: gl.constexpr, ACC: gl.constexpr, STORE: gl.constexpr):
    """Gates of a tile's pairs as columns of its accumulator, and their rows of out as columns of what is stored."""
    pair = gl.arange(0, WIDTH, gl.SliceLayout(0, ACC))
    lane = gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
    rows = gl.load(gather_ptr + start + lane, mask=lane < count, other=0)
    pairs = gl.load(gather_ptr + start + pair, mask=pair < count, other=0)
    return gl.load(gate_ptr + pairs, mask=pair < count, other=0.0), rows


@gluon.jit
def _write(acc, scale, bias, gates, rows, out_ptr, count, n0, N: gl.constexpr, FIRST: gl.constexpr, LAYOUT: gl.constexpr):
    """acc [ROWS, BT] -> scale, bias, then ReLU (FIRST) or gate; stored to `rows` of out [., N], features n0 on."""
    y = acc * scale.to(gl.float32)[:, None] + bias.to(gl.float32)[:, None]
    y = gl.maximum(y, 0.0) if FIRST else y * gates.to(gl.float32)[None, :]
    y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), LAYOUT)
    lane = gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    m = n0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    gl.store(out_ptr + rows.to(gl.int64)[None, :] * N + m[:, None], y, mask=(lane < count)[None, :] & (m >= 0)[:, None])


@gluon.jit
def _wait_ready(ready_ptr, item, num_items, BLOCKS_N: gl.constexpr, TARGET: gl.constexpr):
    """Wait until all blocks of the first GEMM of the item's tile are written."""
    if item < num_items:
        while gl.atomic_add(ready_ptr + item // BLOCKS_N, 0, sem="acquire") < TARGET:
            pass


@gluon.jit
def _tile(
    item,
    expert,
    start,
    count,
    x_ptr,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    out_ptr,
    w_ring,
    x_rings,
    turn,
    rows,
    weights,
    next_rows,
    next_count,
    next_weights,
    next_stride,
    next_there,
    copy_rows,
    copy_count,
    copy_k,
    lane,
    column,
    N: gl.constexpr,
    K: gl.constexpr,
    BITS: gl.constexpr,
    HALVES: gl.constexpr,
    W_STEPS: gl.constexpr,
    X_STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    FIRST: gl.constexpr,
    ROW_DIVISOR: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """One item, WIDTH lanes wide; at its end its successor's operands are on their way. Returns the steps that the rings
    have made, and where copying x goes on."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS  # output features of one dot
    KB: gl.constexpr = 1024 // BITS
    CHUNKS: gl.constexpr = KB // 64
    STEPS: gl.constexpr = K // KB
    BLOCKS_N: gl.constexpr = N // (HALVES * ROWS)
    STRIDE: gl.constexpr = STEPS * 2048
    BY_STEP: gl.constexpr = X_STEPS > 2 and BITS == 4  # see above
    GROUPS: gl.constexpr = X_STEPS - 1 if BY_STEP else X_STEPS * CHUNKS - 2  # copy groups in flight
    PER_GROUP: gl.constexpr = CHUNKS if BY_STEP else 1  # chunks of x in one
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDTH, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    EARLY: gl.constexpr = HALVES * WIDTH <= 128  # else the accumulators leave no registers for the gates
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])  # 128 neighbouring bytes a row
    n0 = item % BLOCKS_N * (HALVES * ROWS)
    scale0, bias0 = _scale_and_bias(s_ptr, b_ptr, expert, n0, N, ROWS, ACC)
    if HALVES == 2:
        scale1, bias1 = _scale_and_bias(s_ptr, b_ptr, expert, n0 + ROWS, N, ROWS, ACC)
    store_lane = gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
    if FIRST:
        gates = scale0  # none
        out_rows = start + store_lane
    elif EARLY:
        gates, out_rows = _gates_and_rows(gather_ptr, gate_ptr, start, count, WIDTH, ACC, STORE)
    acc0 = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, ACC))
    acc1 = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, ACC))
    for step in range(STEPS):
        w_slot = turn % W_STEPS
        x_slot = turn % X_STEPS
        x_before = (turn + X_STEPS - 1) % X_STEPS
        turn += 1
        for c in gl.static_range(CHUNKS):
            if c % PER_GROUP == 0:
                async_copy.wait_group(GROUPS - 1)
                barrier()
                fence_async_shared()
            elif c == 1:
                barrier()  # every warp is done with the step before and has the weights of this one
            if not BY_STEP:
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
                x_step = step + (X_STEPS - 1 if BY_STEP else X_STEPS)
                same = x_step < STEPS
                copy_k = gl.where(same, x_step, x_step - STEPS) * KB
                copy_rows = gl.where(same, rows, next_rows) // ROW_DIVISOR
                copy_count = gl.where(same, count, next_count)
                if BY_STEP:
                    for more in gl.static_range(CHUNKS):
                        buffer = x_rings[more].index(x_before)
                        _copy_x(buffer, x_ptr, copy_rows, copy_count, copy_k + more * 64, lane, column, K)
                same = step + W_STEPS < STEPS
                first = gl.where(same, weights + (step + W_STEPS) * 2048, next_weights + (step + W_STEPS - STEPS) * 2048)
                stride = gl.where(same, STRIDE, next_stride)
                _copy_w(w_ring, w_slot, first, stride, same | next_there, ROWS, HALVES, WARPS)
            if c == 1 or not BY_STEP:
                async_copy.commit_group()
            x = x_rings[c].index(x_slot).slice(0, WIDTH).permute((1, 0))
            acc0 = warpgroup_mma(_decode(words0, c, BITS, ROWS, dtype, A), x, acc0, is_async=True)
            if HALVES == 2:
                acc1 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc1]))
                acc1 = warpgroup_mma(_decode(words1, c, BITS, ROWS, dtype, A), x, acc1, is_async=True)
            acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
    if not (FIRST or EARLY):
        gates, out_rows = _gates_and_rows(gather_ptr, gate_ptr, start, count, WIDTH, ACC, STORE)
    done = warpgroup_mma_wait(HALVES - 1, deps=[acc0])
    _write(done, scale0, bias0, gates, out_rows, out_ptr, count, n0, N, FIRST, STORE)
    if HALVES == 2:
        done = warpgroup_mma_wait(0, deps=[acc1])
        _write(done, scale1, bias1, gates, out_rows, out_ptr, count, n0 + ROWS, N, FIRST, STORE)
    return turn, copy_rows, copy_count, copy_k


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
    second_ptr,
    second_items,
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
    NARROW: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """Items item, item + programs, ... of one GEMM; returns the next item and the steps the rings have made so far.

    CHAINED: after its last item of the first GEMM a program asks for the weights of its first one of the second
    (second_items in all, with weights second_ptr, which have N for K).
    """
    ROWS: gl.constexpr = 16 * WARPS  # output features of one dot
    KB: gl.constexpr = 1024 // BITS
    CHUNKS: gl.constexpr = KB // 64
    STEPS: gl.constexpr = K // KB
    STRIDE: gl.constexpr = STEPS * 2048
    STRIPS: gl.constexpr = N // 64
    TILE_STRIPS: gl.constexpr = HALVES * ROWS // 64
    BLOCKS_N: gl.constexpr = STRIPS // TILE_STRIPS
    SECOND_STRIDE: gl.constexpr = N // KB * 2048
    SECOND_STRIPS: gl.constexpr = K // 64
    SECOND_BLOCKS: gl.constexpr = SECOND_STRIPS // TILE_STRIPS
    BY_STEP: gl.constexpr = X_STEPS > 2 and BITS == 4  # see above
    GROUPS: gl.constexpr = X_STEPS - 1 if BY_STEP else X_STEPS * CHUNKS - 2  # copy groups in flight
    PER_GROUP: gl.constexpr = CHUNKS if BY_STEP else 1  # chunks of x in one
    ROW_DIVISOR: gl.constexpr = TOP_K if FIRST else 1
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    lane = gl.arange(0, BT, gl.SliceLayout(1, COPY))
    column = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    programs = gl.num_programs(0)
    expert, start, count = _entry(item, num_items, tiles_ptr, BLOCKS_N)
    next_expert, next_start, next_count = _entry(item + programs, num_items, tiles_ptr, BLOCKS_N)
    weights = _weights(w_ptr, expert, item % BLOCKS_N, STRIPS, TILE_STRIPS, STRIDE)
    if FIRST and CHAINED:
        second = item + (gl.maximum(num_items - item, 0) + programs - 1) // programs * programs - num_items
        second_there = second < second_items
        second_expert = gl.load(tiles_ptr + second // SECOND_BLOCKS * 4, mask=second_there, other=0)
        second_weights = _weights(
            second_ptr, second_expert, second % SECOND_BLOCKS, SECOND_STRIPS, TILE_STRIPS, SECOND_STRIDE
        )
    if not FIRST:
        _wait_ready(ready_ptr, item, num_items, BLOCKS_N, TARGET)
        async_copy.wait_group(0)
        barrier()  # the rings of x are free
        if CHAINED and (turn == 0) & (item < num_items):  # no item of the first GEMM: nobody has asked for the weights
            for q in gl.static_range(W_STEPS):
                _copy_w(w_ring, q, weights + q * 2048, STRIDE, True, ROWS, HALVES, WARPS)
    rows = _rows(start, count, gather_ptr, lane, FIRST)
    copy_rows = rows // ROW_DIVISOR
    for group in gl.static_range(GROUPS):
        if FIRST or not CHAINED:
            there = item < num_items
            if group < W_STEPS:
                _copy_w(w_ring, (turn + group) % W_STEPS, weights + group * 2048, STRIDE, there, ROWS, HALVES, WARPS)
            if group == GROUPS - 1:
                for more in gl.static_range(GROUPS, W_STEPS):
                    _copy_w(w_ring, (turn + more) % W_STEPS, weights + more * 2048, STRIDE, there, ROWS, HALVES, WARPS)
        for c in gl.static_range(group * PER_GROUP, (group + 1) * PER_GROUP):
            buffer = x_rings[c % CHUNKS].index((turn + c // CHUNKS) % X_STEPS)
            _copy_x(buffer, x_ptr, copy_rows, count, c * 64, lane, column, K)
        async_copy.commit_group()
    copy_count = count
    copy_k = (X_STEPS - 1) * KB
    while item < num_items:
        following = item + programs
        if not FIRST:
            _wait_ready(ready_ptr, following, num_items, BLOCKS_N, TARGET)
        next_rows = _rows(next_start, next_count, gather_ptr, lane, FIRST)
        third_expert, third_start, third_count = _entry(following + programs, num_items, tiles_ptr, BLOCKS_N)
        next_weights = _weights(w_ptr, next_expert, following % BLOCKS_N, STRIPS, TILE_STRIPS, STRIDE)
        copy_weights = next_weights
        copy_stride = gl.to_tensor(STRIDE)
        copy_there = following < num_items
        if FIRST and CHAINED:
            to_second = (following >= num_items) & second_there
            copy_weights = gl.where(to_second, second_weights, next_weights)
            copy_stride = gl.where(to_second, SECOND_STRIDE, STRIDE)
            copy_there = copy_there | to_second
        of_item = (item, expert, start, count, x_ptr, s_ptr, b_ptr, gate_ptr, gather_ptr, out_ptr, w_ring, x_rings, turn)
        of_next = (next_rows, next_count, copy_weights, copy_stride, copy_there)
        of_copies = (copy_rows, copy_count, copy_k, lane, column)
        if NARROW > 0 and count <= NARROW:
            turn, copy_rows, copy_count, copy_k = _tile(
                *of_item,
                rows,
                weights,
                *of_next,
                *of_copies,
                N,
                K,
                BITS,
                HALVES,
                W_STEPS,
                X_STEPS,
                WARPS,
                FIRST,
                ROW_DIVISOR,
                NARROW,
            )
        else:
            turn, copy_rows, copy_count, copy_k = _tile(
                *of_item,
                rows,
                weights,
                *of_next,
                *of_copies,
                N,
                K,
                BITS,
                HALVES,
                W_STEPS,
                X_STEPS,
                WARPS,
                FIRST,
                ROW_DIVISOR,
                BT,
            )
        if FIRST:
            barrier()  # every thread's stores come before the release
            gl.atomic_add(ready_ptr + item // BLOCKS_N, 1, sem="release")
        item = following
        expert = next_expert
        start = next_start
        count = next_count
        rows = next_rows
        weights = next_weights
        next_expert = third_expert
        next_start = third_start
        next_count = third_count
    if not FIRST:
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
    NARROW: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """relu(x W1^T + b1) W2^T + b2 times the gate: hidden [P, F] in expert order, out [P, D] in pair order.

    Items: (tile, n block) of the first GEMM, then of the second. sync as in `expert_ffn_kernel`: zeroed by the router, tile
    counters from word 4 on. BN1, BN2: 16 or 32 features a warp. A tile of at most NARROW pairs multiplies NARROW lanes, any
    other BT (NARROW 0: all tiles).
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
    wait_for_inputs(OVERLAP)
    num_tiles = gl.load(num_tiles_ptr)
    num_first = num_tiles * (F // BN1)
    num_second = num_tiles * (D // BN2)
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
        w2_ptr,
        num_second,
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
        NARROW,
        HALVES1 == HALVES2,
    )
    _gemm(
        item - num_first,
        num_second,
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
        w2_ptr,
        num_second,
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
        NARROW,
        HALVES1 == HALVES2,
    )
