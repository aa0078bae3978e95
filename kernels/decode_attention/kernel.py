"""Self-attention: one program = BE entries and one head. Cross-attention: one program = one group and one head.

R entries (rows of the batch), H heads, DH head_dim; a cell is [2, H, DH]: key, then value. Scores are kept in powers of
two (`scale_log2` = log2(e) / sqrt(DH)). The head is the fast axis of both grids: programs that run side by side read
neighbouring bytes. AHEAD: all but the queries, and but what this step writes, is read before the kernel before is done, and
the next kernel may start before that too; the same sums in the same order, so the same bits. `grouped.py` has what 16 bits
on Hopper take instead.
"""

import triton
import triton.language as tl

from kernels.dependency import let_next_start, wait_for_kernels_before
from kernels.entries import ends_at_once, entries_of, follows_start_token


@triton.jit(do_not_specialize=["R", "ancestry_stride"])
def decode_self_attention_kernel(
    q_ptr,
    cells_ptr,
    ancestry_ptr,
    rows_ptr,
    positions_ptr,
    out_ptr,
    R,
    q_stride,
    row_stride,
    ancestry_stride,
    scale_log2,
    H: tl.constexpr,
    DH: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """LANES positions of an entry side by side, BT / LANES of them after each other, all loads of a step at once.

    The entries of a program are neighbours, as the beams of a sentence are: cells that they share come from L1. Each lane
    has its own running softmax over every LANES-th earlier position; lanes and the entry's own position meet once, after
    the loop. A position that an entry does not have adds an exact zero to its lane: an entry's bits depend on neither its
    neighbours nor the length of the loop.
    """
    wait_for_kernels_before(OVERLAP and not AHEAD)
    let_next_start(OVERLAP)
    head = tl.program_id(0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    d = tl.arange(0, DH)
    # Axes: step, entry, lane, feature. Triton lays threads out from the last axis on: with 16 bytes a thread, LANES * DH
    # fill the warps of one entry exactly (launcher.self_constants), so warps of different entries share no sum.
    step = tl.arange(0, BT // LANES)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    row = tl.load(rows_ptr + e, mask=e < R, other=-1)
    last = tl.where(row >= 0, tl.load(positions_ptr + e, mask=e < R, other=-1), -1)
    ancestry_ptrs = ancestry_ptr + row.to(tl.int64)[None, :, None] * ancestry_stride + step
    earlier = step < last[None, :, None]
    holder = tl.load(ancestry_ptrs, mask=earlier, other=0)
    k_ptrs = cells_ptr + (holder.to(tl.int64) * row_stride + step * (2 * H * DH) + head * DH)[:, :, :, None] + d
    if AHEAD:  # noqa: SIM102 (the outer one is decided while compiling)
        if tl.max(follows_start_token(last).to(tl.int32), 0) > 0:
            wait_for_kernels_before(OVERLAP)
    k = tl.load(k_ptrs, mask=earlier[:, :, :, None], other=0.0)
    v = tl.load(k_ptrs + H * DH, mask=earlier[:, :, :, None], other=0.0)
    holder = tl.load(ancestry_ptrs + BT, mask=step + BT < last[None, :, None], other=0)  # for the next step
    wait_for_kernels_before(OVERLAP and AHEAD)
    active = (last >= 0)[:, None]
    q_ptrs = q_ptr + e.to(tl.int64)[:, None] * q_stride + head * DH + d[None, :]
    q = tl.load(q_ptrs, mask=active, other=0.0).to(tl.float32)
    own_ptrs = cells_ptr + (row.to(tl.int64) * row_stride + last * (2 * H * DH) + head * DH)[:, None] + d[None, :]
    own_k = tl.load(own_ptrs, mask=active, other=0.0).to(tl.float32)
    own_v = tl.load(own_ptrs + H * DH, mask=active, other=0.0).to(tl.float32)
    own = tl.sum(q * own_k, 1) * scale_log2  # 0 for an inactive entry, whose value is 0 too
    score = tl.sum(q[None, :, None, :] * k.to(tl.float32), 3) * scale_log2
    score = tl.where(earlier, score, float("-inf"))
    peak = tl.max(score, 0)
    weight = tl.exp2(score - tl.where(peak == float("-inf"), 0.0, peak)[None, :, :])
    total = tl.sum(weight, 0)
    acc = tl.sum(weight[:, :, :, None] * v.to(tl.float32), 0)
    for first in range(BT, tl.max(last, 0), BT):
        t = first + step
        earlier = t < last[None, :, None]
        k_ptrs = cells_ptr + (holder.to(tl.int64) * row_stride + t * (2 * H * DH) + head * DH)[:, :, :, None] + d
        k = tl.load(k_ptrs, mask=earlier[:, :, :, None], other=0.0)
        v = tl.load(k_ptrs + H * DH, mask=earlier[:, :, :, None], other=0.0)
        holder = tl.load(ancestry_ptrs + first + BT, mask=t + BT < last[None, :, None], other=0)
        score = tl.sum(q[None, :, None, :] * k.to(tl.float32), 3) * scale_log2
        score = tl.where(earlier, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[None, :, :])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay[:, :, None] + tl.sum(weight[:, :, :, None] * v.to(tl.float32), 0)
        peak = new_peak
    top = tl.maximum(tl.max(peak, 1), own)
    share, own_share = tl.exp2(peak - top[:, None]), tl.exp2(own - top)
    denominator = tl.sum(total * share, 1) + own_share
    context = (tl.sum(acc * share[:, :, None], 1) + own_share[:, None] * own_v) / denominator[:, None]
    out_ptrs = out_ptr + e.to(tl.int64)[:, None] * (H * DH) + head * DH + d[None, :]
    tl.store(out_ptrs, context.to(out_ptr.dtype.element_ty), mask=(e < R)[:, None])


@triton.jit
def decode_cross_attention_kernel(
    q_ptr,
    cells_ptr,
    lengths_ptr,
    slots_ptr,
    starts_ptr,
    counts_ptr,
    out_ptr,
    q_stride,
    slot_stride,
    scale_log2,
    H: tl.constexpr,
    DH: tl.constexpr,
    BE: tl.constexpr,
    MOST: tl.constexpr,
    BS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The group's entries, MOST at most, are the rows of each dot (padded to BE): a source cell is read once for all of
    them. Unused groups end at once."""
    wait_for_kernels_before(OVERLAP and not AHEAD)
    let_next_start(OVERLAP)
    head = tl.program_id(0)
    group = tl.program_id(1)
    slot = tl.load(slots_ptr + group)
    start = tl.load(starts_ptr + group)
    count = entries_of(slot, tl.load(counts_ptr + group), MOST)
    if ends_at_once(count):
        return
    length = tl.load(lengths_ptr + slot, mask=count > 0, other=0)
    i = tl.arange(0, BE)
    d = tl.arange(0, DH)
    live = i < count
    entry = (start + i).to(tl.int64)
    cells = cells_ptr + slot.to(tl.int64) * slot_stride + head * DH
    s = tl.arange(0, BS)
    there = s < length
    k_ptrs = cells + s[:, None] * (2 * H * DH) + d[None, :]
    k = tl.load(k_ptrs, mask=there[:, None], other=0.0)
    v = tl.load(k_ptrs + H * DH, mask=there[:, None], other=0.0)
    wait_for_kernels_before(OVERLAP and AHEAD)
    q = tl.load(q_ptr + entry[:, None] * q_stride + (head * DH + d)[None, :], mask=live[:, None], other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    score = tl.where(there[None, :], score, float("-inf"))
    peak = tl.max(score, 1)
    weight = tl.exp2(score - tl.where(length > 0, peak, 0.0)[:, None])
    total = tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    if length > BS:  # else not even the loop's first loads are set up
        for first in tl.range(BS, length, BS, num_stages=STAGES):
            s = first + tl.arange(0, BS)
            there = s < length
            k_ptrs = cells + s[:, None] * (2 * H * DH) + d[None, :]
            k = tl.load(k_ptrs, mask=there[:, None], other=0.0)
            v = tl.load(k_ptrs + H * DH, mask=there[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            score = tl.where(there[None, :], score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - new_peak[:, None])
            decay = tl.exp2(peak - new_peak)
            total = total * decay + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            peak = new_peak
    context = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_ptrs = out_ptr + entry[:, None] * (H * DH) + (head * DH + d)[None, :]
    tl.store(out_ptrs, context.to(out_ptr.dtype.element_ty), mask=live[:, None])
