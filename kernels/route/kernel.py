"""Two launches: gate GEMM with softmax and top-k, then expert order without any talk between programs.

T tokens, D d_model, E experts (E_PAD the next power of two), P = T * TOP_K pairs.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def gate_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    active_ptr,
    partial_ptr,
    semaphore_ptr,
    ids_ptr,
    gates_ptr,
    T,
    gate_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
    KC: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = BT tokens and one of SPLIT parts of D. With SPLIT > 1 the last program of a token block adds the
    parts in
    order (fp32 partial logits [SPLIT, T, E_PAD]) and leaves the block's semaphore at zero."""
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    block = tl.program_id(0)
    split = tl.program_id(1)
    rows = block * BT + tl.arange(0, BT)
    live = rows < T
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, KC)
    acc = tl.zeros((BT, E_PAD), dtype=tl.float32)
    PART: tl.constexpr = (D + KC * SPLIT - 1) // (KC * SPLIT) * KC
    for step in range(0, PART, KC):
        at = split * PART + step + k
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * D + at[None, :], mask=live[:, None] & (at < D)[None, :], other=0.0)
        w = tl.load(w_ptr + e[None, :] * D + at[:, None], mask=(e < E)[None, :] & (at < D)[:, None], other=0.0)
        acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="tf32x3")
    last = True
    if SPLIT > 1:
        part_ptrs = partial_ptr + rows.to(tl.int64)[:, None] * E_PAD + e[None, :]
        stride = T.to(tl.int64) * E_PAD
        tl.store(part_ptrs + split * stride, acc, mask=live[:, None])
        tl.debug_barrier()  # every thread's stores come before thread 0's release
        last = tl.atomic_add(semaphore_ptr + block, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.load(part_ptrs, mask=live[:, None], other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLIT):
                acc += tl.load(part_ptrs + part * stride, mask=live[:, None], other=0.0, cache_modifier=".cg")
            tl.store(semaphore_ptr + block, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        logits = tl.where((e < E)[None, :], acc, float("-inf"))
        exp = tl.exp(logits - tl.max(logits, 1)[:, None])
        probs = (exp / tl.sum(exp, 1)[:, None]).to(dtype).to(tl.float32)
        first = tl.minimum(tl.argmax(probs, 1, tie_break_left=True), E - 1)
        p1 = tl.sum(tl.where(e[None, :] == first[:, None], probs, 0.0), 1)
        active = live
        if HAS_ACTIVE:
            active = live & (tl.load(active_ptr + rows, mask=live, other=0) != 0)
        if TOP_K == 1:
            tl.store(ids_ptr + rows, tl.where(active, first, -1), mask=live)
            tl.store(gates_ptr + rows, tl.where(active, p1 * gate_scale, 0.0), mask=live)
        else:
            rest = tl.where(e[None, :] == first[:, None], float("-inf"), logits)
            second = tl.minimum(tl.argmax(rest, 1, tie_break_left=True), E - 1)
            p2 = tl.sum(tl.where(e[None, :] == second[:, None], probs, 0.0), 1)
            total = tl.maximum((p1 + p2).to(dtype).to(tl.float32), EPS)
            g1 = (p1 / total).to(dtype).to(tl.float32) * gate_scale
            g2 = (p2 / total).to(dtype).to(tl.float32) * gate_scale
            tl.store(ids_ptr + rows * 2, tl.where(active, first, -1), mask=live)
            tl.store(ids_ptr + rows * 2 + 1, tl.where(active, second, -1), mask=live)
            tl.store(gates_ptr + rows * 2, tl.where(active, g1, 0.0), mask=live)
            tl.store(gates_ptr + rows * 2 + 1, tl.where(active, g2, 0.0), mask=live)


@triton.jit(do_not_specialize=["P", "sync_words"])
def expert_order_kernel(
    ids_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    tiles_ptr,
    num_tiles_ptr,
    sync_ptr,
    P,
    sync_words,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = one expert: it counts every expert's pairs itself, so it knows where its own begin."""
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for c in range(0, P, CHUNK):
        ids = tl.load(ids_ptr + c + lane, mask=c + lane < P, other=-1)
        # inactive pairs are counted in the bin of expert 0 and taken out again: a histogram takes no negative value
        counts += tl.histogram(tl.maximum(ids, 0), E_PAD)
        counts -= tl.where(e == 0, tl.sum((ids < 0).to(tl.int32), 0), 0)
    tiles = (counts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    own = tl.sum(tl.where(e == expert, counts, 0), 0)
    offset = tl.sum(tl.where(e < expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(e < expert, tiles, 0), 0)
    tl.store(counts_ptr + expert, own)
    tl.store(offsets_ptr + expert, offset)
    if expert == E - 1:
        tl.store(offsets_ptr + E, offset + own)
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for t in range(0, own, BLOCK_TOKENS * 32):
        tile = t // BLOCK_TOKENS + tl.arange(0, 32)
        mask = tile * BLOCK_TOKENS < own
        record = tiles_ptr + (first_tile + tile) * 4
        tl.store(record, tl.zeros((32,), tl.int32) + expert, mask=mask)
        tl.store(record + 1, offset + tile * BLOCK_TOKENS, mask=mask)
        tl.store(record + 2, tl.minimum(own - tile * BLOCK_TOKENS, BLOCK_TOKENS), mask=mask)
        tl.store(record + 3, tl.zeros((32,), tl.int32), mask=mask)
    for s in range(expert * 256, sync_words, E * 256):
        word = s + tl.arange(0, 256)
        tl.store(sync_ptr + word, tl.zeros((256,), tl.int32), mask=word < sync_words)
    done = offset
    for c in range(0, P, CHUNK):
        pair = c + lane
        ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1)
        mine = ids == expert
        position = done + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(gather_ptr + position, pair, mask=mine)
        tl.store(scatter_ptr + pair, position, mask=mine)
        done += tl.sum(mine.to(tl.int32), 0)
        if expert == 0:
            tl.store(scatter_ptr + pair, tl.zeros((CHUNK,), tl.int32) - 1, mask=(ids < 0) & (pair < P))
