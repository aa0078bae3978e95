"""Both GEMMs of the expert FFN in one persistent launch, for few pairs: weights stream without a gap between the two.

T tokens, P = T * TOP_K pairs, D d_model, F d_ff. Tiles and their records as in kernel.py. Work items in order: (tile, n
block) of the first GEMM, then (tile, n block, k split) of the second. An item of the second GEMM waits until its tile's
counter says that the first GEMM's n blocks are all written; items of the first never wait, so the order cannot deadlock.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import ask_for_bytes, wait_for_inputs
from kernels.expert_gemm.epilogue import epilogue
from kernels.expert_gemm.products import accumulate


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
            ask_for_bytes(w_ptr + (expert * N + n_block * BN).to(tl.int64) * K, BN * K * 2)
    else:
        BLOCKS: tl.constexpr = (K + 1024 // BITS - 1) // (1024 // BITS)
        strip = (expert * (N // 64) + n_block * (BN // 64)).to(tl.int64)
        if SPLIT == 1:
            ask_for_bytes(w_ptr + strip * BLOCKS * 2048, (BN // 64) * BLOCKS * 8192)
        else:
            for part in tl.static_range(BN // 64):
                ask_for_bytes(w_ptr + ((strip + part) * BLOCKS + first) * 2048, STEPS * 8192)


@triton.jit
def _prefetch_second(
    w_ptr,
    expert,
    own,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The same for item `own` of the second GEMM."""
    PER_TILE: tl.constexpr = (N + BN - 1) // BN * SPLIT
    _prefetch(w_ptr, expert, own % PER_TILE // SPLIT, own % SPLIT * STEPS, N, K, BITS, BN, STEPS, SPLIT)


@triton.jit
def _item_expert(tiles_ptr, item, num_first, num_items, PER_TILE1: tl.constexpr, PER_TILE2: tl.constexpr):
    """Expert of a work item; items [0, num_first) are of the first GEMM, the rest of the second."""
    tile = tl.where(item < num_first, item // PER_TILE1, (item - num_first) // PER_TILE2)
    return tl.load(tiles_ptr + tile * 4, mask=item < num_items, other=0)


@triton.jit
def _next_item(ahead, ticket_ptr, DYNAMIC: tl.constexpr):
    """The next ticket, or item `ahead`; and the item after that."""
    if DYNAMIC:
        item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    else:
        item = ahead
        ahead += tl.num_programs(0)
    return item, ahead


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
    """A program takes items pid, pid + G, ... (all G programs must be resident: cooperative launch) or, DYNAMIC, the next
    number of a ticket counter. The last program to finish a k split adds the parts in split order.
    sync int32, zeroed by the router before every launch: [ticket, 0, 0, 0, tile counters[max_tiles], split counters].
    hidden [P, F] in expert order; out [P, D] in pair order; partial fp32 [SPLIT, P, D] in expert order.
    """
    wait_for_inputs(OVERLAP)
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
            expert = _item_expert(tiles_ptr, item, num_first, num_items, NB1, PER2)
            _prefetch_second(w2_ptr, expert, own, D, F, BITS, BN2, STEPS2, SPLIT)

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
                _prefetch_second(w2_ptr, expert_ahead, ahead - num_first, D, F, BITS, BN2, STEPS2, SPLIT)
            expert_ahead = _item_expert(tiles_ptr, ahead + tl.num_programs(0), num_first, num_items, NB1, PER2)
        valid = lane < count
        pairs = tl.load(gather_ptr + start + lane, mask=valid, other=0)
        rows = (pairs // TOP_K).to(tl.int64)
        acc = accumulate(
            x_ptr, rows, valid, w1_ptr, s1_ptr, expert, n_block, 0, STEPS1, F, D, BITS, GROUP, BN1, BT, JOIN, STAGES, ASM
        )
        h = epilogue(acc, s1_ptr, b1_ptr, gate_ptr, pairs, valid, expert, n_block, F, BITS, GROUP, BN1, True)
        n = n_block * BN1 + tl.arange(0, BN1)
        tl.store(
            hidden_ptr + (start + lane).to(tl.int64)[None, :] * F + n[:, None],
            h.to(hidden_ptr.dtype.element_ty),
            mask=valid[None, :] & (n < F)[:, None],
        )
        tl.debug_barrier()  # every thread's stores come before thread 0's release
        tl.atomic_add(ready_ptr + tile, 1, sem="release")
        item, ahead = _next_item(ahead, sync_ptr, DYNAMIC)

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
                _prefetch_second(w2_ptr, expert_ahead, ahead - num_first, D, F, BITS, BN2, STEPS2, SPLIT)
            expert_ahead = _item_expert(tiles_ptr, ahead + tl.num_programs(0), num_first, num_items, NB1, PER2)
        valid = lane < count
        pairs = tl.load(gather_ptr + start + lane, mask=valid, other=0)
        rows = (start + lane).to(tl.int64)
        n = n_block * BN2 + tl.arange(0, BN2)
        mask = valid[None, :] & (n < D)[:, None]
        while tl.atomic_add(ready_ptr + tile, 0, sem="acquire") < NB1:
            pass
        of_item = (hidden_ptr, rows, valid, w2_ptr, s2_ptr, expert, n_block)
        acc = accumulate(*of_item, split * STEPS2, STEPS2, D, F, BITS, GROUP, BN2, BT, JOIN, STAGES, ASM)
        out_ptrs = out_ptr + pairs.to(tl.int64)[None, :] * D + n[:, None]
        last = True
        if SPLIT > 1:
            part_ptrs = partial_ptr + rows[None, :] * D + n[:, None]
            stride = num_pairs.to(tl.int64) * D
            tl.store(part_ptrs + split * stride, acc, mask=mask)
            tl.debug_barrier()  # every thread's stores come before thread 0's release
            last = tl.atomic_add(split_ptr + tile * NB2 + n_block, 1, sem="acq_rel") == SPLIT - 1
        if last:
            if SPLIT > 1:
                acc = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                for part in tl.static_range(1, SPLIT):
                    acc += tl.load(part_ptrs + part * stride, mask=mask, other=0.0, cache_modifier=".cg")
            y = epilogue(acc, s2_ptr, b2_ptr, gate_ptr, pairs, valid, expert, n_block, D, BITS, GROUP, BN2, False)
            tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
        item, ahead = _next_item(ahead, sync_ptr, DYNAMIC)
