"""The router in one launch, for few tokens. T tokens, D d_model, E experts (E_PAD the next power of two)."""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.route.choice import choose, store_lists, sum_of_parts, zero


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
    zero(sync_ptr, sync_words, split * 256, SPLIT * 256)
    logits = tl.zeros((BT, E_PAD), dtype=tl.float32)
    logits = tl.dot(x.to(tl.float32), w.to(tl.float32), logits, input_precision="tf32x3")
    base = partial_ptr + rows[:, None] * E_PAD + e[None, :]
    tl.store(base + split * (T * E_PAD), logits, mask=live[:, None])
    tl.debug_barrier()  # every thread's stores come before thread 0's release
    if tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == SPLIT - 1:
        total = sum_of_parts(base, T * E_PAD, live, bias_ptr, e, E, SPLIT, HAS_BIAS)
        tl.store(semaphore_ptr, 0)
        first, second = choose(
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
        store_lists(counts, e, counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, E, E_PAD, BLOCK_TOKENS)
