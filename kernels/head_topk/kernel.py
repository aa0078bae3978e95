"""The first launch: logits by chunks of the vocabulary with their maximum and sum of exponentials (`merge` is the second).
And the one before it, which clears what programs of gated and of Hopper's tiles tell each other.

R rows, D features, V vocabulary (columns from V on are padding: never read), BV logits a chunk, C = ceil(V / BV) chunks.
Weights are the M side of each dot, rows the n side: a step of one row pads to 16 lanes only, and int8 codes are converted
in the registers that feed the dot, or multiplied as they are by rows of int8 codes (sums in int32, hence exact). Logits stay
in fp32: rounded to 16 bits many of them would tie.

What the launches hand over, here and in `specialized`: partials fp32[C / PACK, R, PACK, 2], maximum and sum of a chunk of a
row, packed so that neither side touches memory by single words; logits fp32[C][R][BV], chunk by chunk (the last chunk is as
wide as what is left), so that what a program writes lies together; thresholds int32[GROUPS, R] (`ordered`). `online` keeps
maxima and sums apart.
"""

import triton
import triton.language as tl

from kernels.dependency import let_next_start_and_wait, wait_for_inputs


@triton.jit
def ordered(value):
    """fp32 -> int32 that orders as it does (its own inverse on the bits); -0.0 counts as 0.0, so that they tie."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _chunk_results(
    acc,
    x_scale_ptr,
    scale_ptr,
    banned_ptr,
    threshold_ptr,
    partial_ptr,
    banned_logit_ptr,
    logits_ptr,
    chunk,
    first,
    R,
    V,
    BITS: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    SLICE: tl.constexpr,
    GROUPS: tl.constexpr,
    PACK: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Store what the second launch needs of logits acc[BV, BR] of rows first ...: maximum, sum of exp(logit - maximum), and
    the logits of rows whose maximum may still be among the k best. A banned token counts in none of the three; its own logit
    is kept. Tiles wider than SLICE rows are worked off by halves: what is in flight then fits the registers beside acc."""
    if BR > SLICE:
        low, high = tl.split(tl.permute(tl.reshape(acc, (BV, 2, BR // 2)), (0, 2, 1)))
        _chunk_results(
            low,
            x_scale_ptr,
            scale_ptr,
            banned_ptr,
            threshold_ptr,
            partial_ptr,
            banned_logit_ptr,
            logits_ptr,
            chunk,
            first,
            R,
            V,
            BITS,
            BV,
            BR // 2,
            SLICE,
            GROUPS,
            PACK,
            HAS_BANNED,
            GATED,
        )
        _chunk_results(
            high,
            x_scale_ptr,
            scale_ptr,
            banned_ptr,
            threshold_ptr,
            partial_ptr,
            banned_logit_ptr,
            logits_ptr,
            chunk,
            first + BR // 2,
            R,
            V,
            BITS,
            BV,
            BR // 2,
            SLICE,
            GROUPS,
            PACK,
            HAS_BANNED,
            GATED,
        )
    else:
        v = chunk * BV + tl.arange(0, BV)
        rows = first + tl.arange(0, BR)
        live = rows < R
        if GATED:
            # Least of GROUPS >= k group maxima: k chunks reach it, so a chunk below it holds none of the k best. A stale
            # value is lower, hence safe: what is stored depends on timing, what is found does not.
            group = tl.arange(0, GROUPS)[None, :] * R + rows[:, None]
            threshold = tl.min(tl.load(threshold_ptr + group, mask=live[:, None], other=0, cache_modifier=".cg"), 1)
        if BITS == 8:
            integers: tl.constexpr = acc.dtype == tl.int32
            acc = acc.to(tl.float32) * tl.load(scale_ptr + v, mask=v < V, other=0.0)[:, None]
            if integers:
                acc *= tl.load(x_scale_ptr + rows, mask=live, other=0.0)[None, :]
        acc = tl.where((v < V)[:, None], acc, float("-inf"))
        if HAS_BANNED:
            banned = tl.load(banned_ptr + rows, mask=live, other=-1)
            here = (banned >= chunk * BV) & (banned < tl.minimum(chunk * BV + BV, V))
            if tl.max(here.to(tl.int32), 0) > 0:  # a chunk rarely holds anybody's banned token
                hit = v[:, None] == banned[None, :]
                tl.store(banned_logit_ptr + rows, tl.sum(tl.where(hit, acc, 0.0), 0), mask=here)
                acc = tl.where(hit, float("-inf"), acc)
        top = tl.max(acc, 0)
        # exp(-inf - -inf) would be NaN where a chunk holds nothing but -inf; NaN or +inf makes the sum NaN, as it should
        total = tl.sum(tl.exp(acc - tl.where(top == float("-inf"), 0.0, top)[None, :]), 0)
        at = (chunk // PACK * R + rows) * (2 * PACK) + chunk % PACK * 2
        tl.store(partial_ptr + at, top, mask=live)
        tl.store(partial_ptr + at + 1, total, mask=live)
        keep = live
        if GATED:
            order = ordered(top)
            keep = live & (order >= threshold)
            tl.atomic_max(threshold_ptr + chunk % GROUPS * R + rows, order, mask=keep, sem="relaxed")
        start = chunk * BV
        at = start.to(tl.int64) * R + rows[None, :] * tl.minimum(V - start, BV) + tl.arange(0, BV)[:, None]
        tl.store(logits_ptr + at, acc, mask=keep[None, :] & (v < V)[:, None])


@triton.jit(do_not_specialize=["N", "R"])
def head_start_kernel(
    threshold_ptr,
    flag_ptr,
    banned_ptr,
    N,
    R,
    V,
    BV: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: N thresholds that everything reaches, and (FLAGS > 0) for each BV tokens whether some row may not choose
    one of them."""
    let_next_start_and_wait(OVERLAP)  # the next kernel waits for this one before it reads anything
    block = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        tl.store(threshold_ptr + start + block, tl.full((BLOCK,), -(2**31), tl.int32), mask=start + block < N)
    if FLAGS > 0:
        flag = tl.arange(0, FLAGS)
        tl.store(flag_ptr + flag, tl.zeros((FLAGS,), tl.int32), mask=flag < tl.cdiv(V, BV))
        if HAS_BANNED:
            tl.debug_barrier()
            for start in range(0, R, BLOCK):
                banned = tl.load(banned_ptr + start + block, mask=start + block < R, other=-1)
                one = tl.full((BLOCK,), 1, tl.int32)
                tl.store(flag_ptr + banned // BV, one, mask=(banned >= 0) & (banned < V))


@triton.jit(do_not_specialize=["R"])
def head_chunk_kernel(
    x,
    w,
    x_rest,
    x_scale_ptr,
    scale_ptr,
    banned_ptr,
    threshold_ptr,
    partial_ptr,
    banned_logit_ptr,
    logits_ptr,
    R,
    V,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    BR2: tl.constexpr,
    BK: tl.constexpr,
    SLICE: tl.constexpr,
    GROUPS: tl.constexpr,
    PACK: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = one chunk of the vocabulary x (BR + BR2) rows; BR2 rows (0: none) share its reads of the weights.
    x, w and x_rest are pointers, or tensor descriptors of blocks [BR, BK], [BV, BK] and [BR2, BK] with TMA."""
    wait_for_inputs(OVERLAP)
    ROWS: tl.constexpr = BR + BR2
    row_tiles = tl.cdiv(R, ROWS)
    chunk = tl.program_id(0) // row_tiles  # row tiles of one chunk run side by side: its weights come from L2 again
    first = tl.program_id(0) % row_tiles * ROWS
    v = chunk * BV + tl.arange(0, BV)
    rows = first + tl.arange(0, BR)
    k = tl.arange(0, BK)
    dtype: tl.constexpr = x.dtype if TMA else x.dtype.element_ty
    sums: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    acc = tl.zeros((BV, BR), dtype=sums)
    if BR2 > 0:
        rows2 = first + BR + tl.arange(0, BR2)
        acc2 = tl.zeros((BV, BR2), dtype=sums)
    for start in range(0, D, BK):
        if TMA:
            weight = w.load([chunk * BV, start])
            rows_in = x.load([first, start])
            if BR2 > 0:
                rows_in2 = x_rest.load([first + BR, start])
        else:
            at = start + k
            mask_v = (v < V)[:, None]
            mask_r = (rows < R)[:, None]
            if D % BK != 0:
                mask_v = mask_v & (at < D)[None, :]
                mask_r = mask_r & (at < D)[None, :]
            weight = tl.load(w + v.to(tl.int64)[:, None] * D + at[None, :], mask=mask_v, other=0)
            rows_in = tl.load(x + rows.to(tl.int64)[:, None] * D + at[None, :], mask=mask_r, other=0)
            if BR2 > 0:
                mask_r2 = (rows2 < R)[:, None]
                if D % BK != 0:
                    mask_r2 = mask_r2 & (at < D)[None, :]
                rows_in2 = tl.load(x + rows2.to(tl.int64)[:, None] * D + at[None, :], mask=mask_r2, other=0)
        if BITS == 8 and dtype != tl.int8:
            # 1.5 * 2^23 + code as fp32 bits: exact, and cheaper than the conversion instruction
            shifted = (weight.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True)
            weight = (shifted - 12582912.0).to(dtype)
        acc = tl.dot(weight, tl.trans(rows_in), acc, input_precision="ieee", out_dtype=sums)
        if BR2 > 0:
            acc2 = tl.dot(weight, tl.trans(rows_in2), acc2, input_precision="ieee", out_dtype=sums)
    _chunk_results(
        acc,
        x_scale_ptr,
        scale_ptr,
        banned_ptr,
        threshold_ptr,
        partial_ptr,
        banned_logit_ptr,
        logits_ptr,
        chunk,
        first,
        R,
        V,
        BITS,
        BV,
        BR,
        SLICE,
        GROUPS,
        PACK,
        HAS_BANNED,
        GATED,
    )
    if BR2 > 0:
        _chunk_results(
            acc2,
            x_scale_ptr,
            scale_ptr,
            banned_ptr,
            threshold_ptr,
            partial_ptr,
            banned_logit_ptr,
            logits_ptr,
            chunk,
            first + BR,
            R,
            V,
            BITS,
            BV,
            BR2,
            SLICE,
            GROUPS,
            PACK,
            HAS_BANNED,
            GATED,
        )
