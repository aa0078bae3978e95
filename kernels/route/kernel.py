"""The router in two launches (gate GEMM with softmax and top-k; expert order), or in one where tokens are few.

T tokens, D d_model, E experts (E_PAD the next power of two), P = T * TOP_K pairs.
"""

import triton
import triton.language as tl

from kernels.dependency import prefetch_lines, wait_for_inputs


@triton.jit
def _thirds(w, dtype: tl.constexpr, THIRDS: tl.constexpr):
    """THIRDS: fp32 as the sum of three bf16, exactly; else w alone."""
    w = w.to(tl.float32)
    if THIRDS:
        high = w.to(dtype)
        rest = w - high.to(tl.float32)
        middle = rest.to(dtype)
        low = (rest - middle.to(tl.float32)).to(dtype)
    else:
        high, middle, low = w, w, w
    return high, middle, low


@triton.jit
def _add_product(acc, x, high, middle, low, THIRDS: tl.constexpr):
    """acc + x w as in fp32. THIRDS: x is bf16, and w comes in three such parts: three products. Else tf32x3 of w, which is
    `high`: 16-bit x is exact in tf32, w is split in two."""
    if THIRDS:
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, middle, acc)
        acc = tl.dot(x, high, acc)
    else:
        acc = tl.dot(x.to(tl.float32), high, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _sum_of_parts(ptrs, stride, live, bias_ptr, e, E: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Logits [BT, E_PAD]: parts added in order, then the bias."""
    total = tl.load(ptrs, mask=live[:, None], other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptrs + part * stride, mask=live[:, None], other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        total += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _lowest(is_it, e, E: tl.constexpr):
    """The first expert of each row of which something is true; the last one where it is of none (rows of NaN)."""
    return tl.minimum(tl.min(tl.where(is_it, e[None, :], E), 1), E - 1)


@triton.jit
def _choose(
    logits,
    rows,
    live,
    e,
    active_ptr,
    ids_ptr,
    gates_ptr,
    gate_scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Store experts and gates of some tokens; returns first and second choice (twice the first for top-1), -1 where
    inactive."""
    active = live
    if HAS_ACTIVE:
        active = live & (tl.load(active_ptr + rows, mask=live, other=0) != 0)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    exp = tl.exp(logits - peak[:, None])
    total = tl.sum(exp, 1)
    probs = (exp / total[:, None]).to(dtype).to(tl.float32)
    p1 = (1.0 / total).to(dtype).to(tl.float32)  # the largest of probs: exp(0) / total
    best = _lowest(probs == p1[:, None], e, E)
    first = tl.where(active, best, -1)
    second = first
    if TOP_K == 1:
        tl.store(ids_ptr + rows, first, mask=live)
        tl.store(gates_ptr + rows, tl.where(active, p1 * gate_scale, 0.0), mask=live)
    else:
        rest = tl.where(e[None, :] == best[:, None], float("-inf"), logits)
        second_peak = tl.max(rest, 1)
        next_best = _lowest(rest == second_peak[:, None], e, E)
        p2 = (tl.exp(second_peak - peak) / total).to(dtype).to(tl.float32)
        both = tl.maximum((p1 + p2).to(dtype).to(tl.float32), EPS)
        g1 = (p1 / both).to(dtype).to(tl.float32) * gate_scale
        g2 = (p2 / both).to(dtype).to(tl.float32) * gate_scale
        second = tl.where(active, next_best, -1)
        tl.store(ids_ptr + rows * 2, first, mask=live)
        tl.store(ids_ptr + rows * 2 + 1, second, mask=live)
        tl.store(gates_ptr + rows * 2, tl.where(active, g1, 0.0), mask=live)
        tl.store(gates_ptr + rows * 2 + 1, tl.where(active, g2, 0.0), mask=live)
    return first, second


@triton.jit
def _gate_tile(
    x_ptr,
    w_ptr,
    partial_ptr,
    semaphore_ptr,
    T,
    tile,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BT: tl.constexpr,
    KC: tl.constexpr,
    SPLIT: tl.constexpr,
    EXPERT_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    THIRDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BT tokens times one of EXPERT_PARTS parts of the experts over one of SPLIT parts of D: fp32 partial logits
    [SPLIT, T, E_PAD]. Then the token block's semaphore counts one more."""
    BE: tl.constexpr = E_PAD // EXPERT_PARTS
    STEPS: tl.constexpr = (D + KC * SPLIT - 1) // (KC * SPLIT)
    EVEN: tl.constexpr = D % (KC * SPLIT) == 0 and E == E_PAD
    block = tile // (SPLIT * EXPERT_PARTS)
    split = tile % (SPLIT * EXPERT_PARTS) // EXPERT_PARTS
    n = tile % EXPERT_PARTS * BE + tl.arange(0, BE)
    first_k = split * (STEPS * KC)
    k = tl.arange(0, KC)
    rows = block * BT + tl.arange(0, BT)
    live = rows < T
    w_ptrs = w_ptr + n[None, :] * D + (first_k + k)[:, None]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * D + (first_k + k)[None, :]
    acc = tl.zeros((BT, BE), dtype=tl.float32)
    if STEPS == 1:  # weights are nobody's output: they are on their way while the kernel before still runs
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=(n < E)[None, :] & (first_k + k < D)[:, None], other=0.0)
        high, middle, low = _thirds(w, x_ptr.dtype.element_ty, THIRDS)
    # rows that nobody has touched lately come from memory: they, too, are asked for before the wait
    LINE: tl.constexpr = 1024 // x_ptr.dtype.element_ty.primitive_bitwidth
    line = first_k + tl.arange(0, (KC + LINE - 1) // LINE) * LINE
    present = x_ptr + tl.minimum(rows, T - 1).to(tl.int64)[:, None] * D
    for step in tl.static_range(STEPS):
        prefetch_lines(present + tl.minimum(line + step * KC, D - 1)[None, :], OVERLAP)
    wait_for_inputs(OVERLAP)
    if STEPS == 1:
        there = live[:, None] if EVEN else live[:, None] & (first_k + k < D)[None, :]
        x = tl.load(x_ptrs, mask=there, other=0.0)
        acc = _add_product(acc, x, high, middle, low, THIRDS)
    else:
        for step in tl.range(0, STEPS, num_stages=STAGES):
            if EVEN:
                w = tl.load(w_ptrs + step * KC)
                x = tl.load(x_ptrs + step * KC, mask=live[:, None], other=0.0)
            else:
                at = first_k + step * KC + k
                w = tl.load(w_ptrs + step * KC, mask=(n < E)[None, :] & (at < D)[:, None], other=0.0)
                x = tl.load(x_ptrs + step * KC, mask=live[:, None] & (at < D)[None, :], other=0.0)
            high, middle, low = _thirds(w, x_ptr.dtype.element_ty, THIRDS)
            acc = _add_product(acc, x, high, middle, low, THIRDS)
    base = partial_ptr + split * (T.to(tl.int64) * E_PAD) + rows.to(tl.int64)[:, None] * E_PAD
    tl.store(base + n[None, :], acc, mask=live[:, None])
    tl.debug_barrier()  # every thread's stores come before thread 0's release
    tl.atomic_add(semaphore_ptr + block, 1, sem="release")


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
    EXPERT_PARTS: tl.constexpr,
    CHOOSE: tl.constexpr,
    STAGES: tl.constexpr,
    THIRDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first programs compute a tile of partial logits each. Every other one waits for the tiles of its CHOOSE tokens,
    adds the parts of D in order and chooses. It waits for programs of smaller numbers alone, and those start first: no
    program waits for one that cannot start. `expert_order_kernel` zeroes the semaphores."""
    tiles = (T + BT - 1) // BT * (SPLIT * EXPERT_PARTS)
    program = tl.program_id(0)
    if program < tiles:
        _gate_tile(
            x_ptr,
            w_ptr,
            partial_ptr,
            semaphore_ptr,
            T,
            program,
            D,
            E,
            E_PAD,
            BT,
            KC,
            SPLIT,
            EXPERT_PARTS,
            STAGES,
            THIRDS,
            OVERLAP,
        )
    else:
        wait_for_inputs(OVERLAP)
        first = (program - tiles) * CHOOSE
        rows = first + tl.arange(0, CHOOSE)
        live = rows < T
        e = tl.arange(0, E_PAD)
        while tl.atomic_add(semaphore_ptr + first // BT, 0, sem="acquire") < SPLIT * EXPERT_PARTS:
            pass
        tl.debug_barrier()  # no thread reads before thread 0's acquire
        ptrs = partial_ptr + rows.to(tl.int64)[:, None] * E_PAD + e[None, :]
        logits = _sum_of_parts(ptrs, T.to(tl.int64) * E_PAD, live, bias_ptr, e, E, SPLIT, HAS_BIAS)
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        _choose(logits, rows, live, e, active_ptr, ids_ptr, gates_ptr, gate_scale, E, TOP_K, HAS_ACTIVE, EPS, dtype)


@triton.jit
def _store_lists(
    counts,
    e,
    counts_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Counts, offsets and tile records of all experts, from their counts [E_PAD]."""
    tiles = (counts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = tl.cumsum(counts, 0)
    last_tiles = tl.cumsum(tiles, 0)
    offsets = ends - counts
    tl.store(counts_ptr + e, counts, mask=e < E)
    tl.store(offsets_ptr + e, offsets, mask=e < E)
    tl.store(offsets_ptr + 1 + e, ends, mask=e == E - 1)
    tl.store(num_tiles_ptr + tl.zeros((E_PAD,), tl.int32), last_tiles, mask=e == E - 1)
    records = tiles_ptr + (last_tiles - tiles) * 4
    for t in range(tl.max(tiles, 0)):
        mask = t < tiles
        tl.store(records + t * 4, e, mask=mask)
        tl.store(records + t * 4 + 1, offsets + t * BLOCK_TOKENS, mask=mask)
        tl.store(records + t * 4 + 2, tl.minimum(counts - t * BLOCK_TOKENS, BLOCK_TOKENS), mask=mask)
        tl.store(records + t * 4 + 3, tl.zeros((E_PAD,), tl.int32), mask=mask)


@triton.jit
def _zero(ptr, words, first, stride):
    """Zero an int32 buffer in pieces of 256 words from word `first` on, `stride` words apart."""
    for s in range(first, words, stride):
        word = s + tl.arange(0, 256)
        tl.store(ptr + word, tl.zeros((256,), tl.int32), mask=word < words)


@triton.jit
def _smaller(ids, expert):
    """How many of these pairs belong to smaller experts."""
    return tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), 0)


@triton.jit
def _place(ids, pair, expert, before, gather_ptr, scatter_ptr):
    """Store where the pairs of one expert stand in expert order, from position `before` on; returns the next position."""
    mine = ids == expert
    position = before + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(gather_ptr + position, pair, mask=mine)
    tl.store(scatter_ptr + pair, position, mask=mine)
    return before + tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["P", "sync_words", "semaphore_words"])
def expert_order_kernel(
    ids_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    tiles_ptr,
    num_tiles_ptr,
    sync_ptr,
    semaphore_ptr,
    P,
    sync_words,
    semaphore_words,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program e < E places the pairs of expert e: it counts those of smaller experts itself, so nobody waits for anybody.
    It zeroes a share of `sync` too. Program E does the rest: counts, offsets, tiles, inactive pairs, the gate's semaphores.
    ONE_CHUNK: all pairs are in the first CHUNK."""
    wait_for_inputs(OVERLAP)
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    if expert < E:
        _zero(sync_ptr, sync_words, expert * 256, E * 256)
        if ONE_CHUNK:
            ids = tl.load(ids_ptr + lane, mask=lane < P, other=-1)
            _place(ids, lane, expert, _smaller(ids, expert), gather_ptr, scatter_ptr)
        else:
            before = expert * 0
            for c in range(0, P, CHUNK):
                before += _smaller(tl.load(ids_ptr + c + lane, mask=c + lane < P, other=-1), expert)
            for c in range(0, P, CHUNK):
                ids = tl.load(ids_ptr + c + lane, mask=c + lane < P, other=-1)
                before = _place(ids, c + lane, expert, before, gather_ptr, scatter_ptr)
    else:
        _zero(semaphore_ptr, semaphore_words, 0, 256)
        e = tl.arange(0, E_PAD)
        counts = tl.zeros((E_PAD,), dtype=tl.int32)
        for c in range(0, P, CHUNK):
            ids = tl.load(ids_ptr + c + lane, mask=c + lane < P, other=-1)
            tl.store(scatter_ptr + c + lane, tl.zeros((CHUNK,), tl.int32) - 1, mask=(ids < 0) & (c + lane < P))
            counts += tl.histogram(tl.maximum(ids, 0), E_PAD, mask=ids >= 0)
        _store_lists(counts, e, counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, E, E_PAD, BLOCK_TOKENS)


@triton.jit(do_not_specialize=["T", "sync_words"])
def route_few_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    active_ptr,
    partial_ptr,
    semaphore_ptr,
    ids_ptr,
    gates_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    tiles_ptr,
    num_tiles_ptr,
    sync_ptr,
    T,
    sync_words,
    gate_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
    KC: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """At most BT tokens. One program = KC features of D; the last one adds the parts in order, chooses and orders."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = (D + KC - 1) // KC
    split = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    at = split * KC + tl.arange(0, KC)
    rows = tl.arange(0, BT)
    live = rows < T
    w = tl.load(w_ptr + e[None, :] * D + at[:, None], mask=(e < E)[None, :] & (at < D)[:, None], other=0.0)
    wait_for_inputs(OVERLAP)
    inside = live[:, None] & (at < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * D + at[None, :], mask=inside, other=0.0)
    _zero(sync_ptr, sync_words, split * 256, SPLIT * 256)
    logits = tl.zeros((BT, E_PAD), dtype=tl.float32)
    logits = tl.dot(x.to(tl.float32), w.to(tl.float32), logits, input_precision="tf32x3")
    base = partial_ptr + rows[:, None] * E_PAD + e[None, :]
    tl.store(base + split * (T * E_PAD), logits, mask=live[:, None])
    tl.debug_barrier()  # every thread's stores come before thread 0's release
    if tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == SPLIT - 1:
        total = _sum_of_parts(base, T * E_PAD, live, bias_ptr, e, E, SPLIT, HAS_BIAS)
        tl.store(semaphore_ptr, 0)
        first, second = _choose(
            total, rows, live, e, active_ptr, ids_ptr, gates_ptr, gate_scale, E, TOP_K, HAS_ACTIVE, EPS, dtype
        )
        PAIRS: tl.constexpr = BT * TOP_K
        ids = first
        if TOP_K == 2:
            ids = tl.reshape(tl.join(first, second), (PAIRS,))
        pair = tl.arange(0, PAIRS)
        key = tl.where(ids < 0, E, ids)
        # pairs of smaller experts, and earlier ones of the same, stand before a pair
        before = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (pair[None, :] < pair[:, None]))
        position = tl.sum(before.to(tl.int32), 1)
        there = pair < T * TOP_K
        tl.store(gather_ptr + position, pair, mask=there & (ids >= 0))
        tl.store(scatter_ptr + pair, tl.where(ids < 0, -1, position), mask=there)
        counts = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), 0)
        _store_lists(counts, e, counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, E, E_PAD, BLOCK_TOKENS)
