"""The first launch of `head_topk` on Hopper for many rows: programs that live as long as the launch, with a loading warp.

One warp brings tiles of weights and rows into a ring of shared memory; two groups of four warps multiply them and work off
the results, while the next tile's loads fill the ring. Rows are the M side of each product: a row's logits then lie in four
lanes of one warp, and its maximum and sum need two shuffles. Results are kept short, since nothing multiplies meanwhile:
words in pieces, no branches, and what is rare (banned tokens, the vocabulary's end) behind one flag. Gluon has no
interpreter; `kernel.head_chunk_kernel` is the plain twin, and says what the launches hand over. R rows, D features,
V vocabulary, BV logits a tile, in two halves ("chunks") of CH.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _bounds(threshold_ptr, first, R, BR: gl.constexpr, GROUPS: gl.constexpr):
    """Thresholds of all groups for rows first ... [BR, GROUPS]; the four lanes that hold a row's logits share its loads."""
    LG: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUPS, 16])
    group = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, LG))
    at = first + gl.arange(0, BR, layout=gl.SliceLayout(1, LG))
    return gl.load(threshold_ptr + group[None, :] * R + at[:, None], mask=(at < R)[:, None], other=0, cache_modifier=".cg")


@gluon.jit
def _least(bounds, L: gl.constexpr):
    """Least of GROUPS >= k group maxima: k chunks reach it, so a chunk below it holds none of the k best. A stale value is
    lower, hence safe: what is stored depends on timing, what is found does not."""
    return gl.convert_layout(gl.min(bounds, 1), gl.SliceLayout(1, L), assert_trivial=True)


@gluon.jit
def _ordered(value):
    """As `kernel._ordered`."""
    bits = gl.where(value == 0.0, 0.0, value).to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def _take_out(
    acc,
    banned_ptr,
    banned_logit_ptr,
    v0,
    first,
    R,
    V,
    CH: gl.constexpr,
    BR: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    L: gl.constexpr,
):
    """acc[BR, CH] where what lies past the vocabulary and what a row may not choose is -inf; the latter's logit is kept."""
    cols = gl.arange(0, CH, layout=gl.SliceLayout(0, L))
    rows = first + gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    acc = gl.where((v0 + cols < V)[None, :], acc, float("-inf"))
    if HAS_BANNED:
        banned = gl.load(banned_ptr + rows, mask=rows < R, other=-1)
        here = (banned >= v0) & (banned < gl.minimum(v0 + CH, V))
        hit = (v0 + cols)[None, :] == banned[:, None]
        gl.store(banned_logit_ptr + rows, gl.sum(gl.where(hit, acc, 0.0), 1), mask=here & (rows < R))
        acc = gl.where(hit & here[:, None], float("-inf"), acc)
    return acc


@gluon.jit
def _tell(
    acc,
    threshold,
    threshold_ptr,
    partial_ptr,
    v0,
    first,
    R,
    V,
    PACK: gl.constexpr,
    CH: gl.constexpr,
    BR: gl.constexpr,
    GROUPS: gl.constexpr,
    GATED: gl.constexpr,
    L: gl.constexpr,
):
    """Store maximum and sum of exp(logit - maximum) of acc[BR, CH], raise the thresholds; the maximum as an ordered int, and
    which rows exist. Both stores are one instruction each: two words in one piece, and no branch a lane."""
    LOG2E: gl.constexpr = 1.4426950408889634
    top = gl.max(acc, 1)
    shift = gl.where(top == float("-inf"), 0.0, top) * LOG2E
    total = gl.sum(gl.exp2(acc * LOG2E - shift[:, None]), 1)
    rows = first + gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    live = (rows < R) & (v0 < V)
    chunk = v0 // CH
    at = (partial_ptr + (chunk // PACK * R + rows) * (2 * PACK) + chunk % PACK * 2).to(gl.int64)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,f,f,r",
        [at, top, total, live.to(gl.int32)],
        gl.int32,
        False,
        1,
    )
    order = _ordered(top)
    if GATED:
        bound = (threshold_ptr + chunk % GROUPS * R + rows).to(gl.int64)
        wanted = live & (order >= threshold)
        gl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 3; setp.eq.b32 p, t, 0;"
            " setp.ne.and.b32 p, $3, 0, p; @p red.relaxed.gpu.global.max.s32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [bound, order, wanted.to(gl.int32)],
            gl.int32,
            False,
            1,
        )
    return order, live


@gluon.jit
def _save(
    acc,
    order,
    live,
    threshold,
    logits_ptr,
    v0,
    first,
    R,
    V,
    CH: gl.constexpr,
    BR: gl.constexpr,
    GATED: gl.constexpr,
    L: gl.constexpr,
):
    """Store the logits of rows whose maximum may still be among the k best."""
    COLS: gl.constexpr = [[0, 1], [0, 2], [0, 16], [0, 32]] + ([[0, 64]] if CH == 128 else [])
    ROWS: gl.constexpr = [[8, 0]] + ([[64, 0]] if BR == 128 else [])
    LP: gl.constexpr = gl.DistributedLinearLayout(
        COLS + ROWS, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [BR, CH]
    )
    keep = live
    if GATED:
        keep = live & (order >= threshold)
    if v0 + CH <= V:
        # four logits of a lane lie side by side: one instruction stores them; the merge (LANED) knows the order
        moved = gl.reshape(gl.permute(gl.reshape(acc, (BR, CH // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (BR, CH))
        at = (logits_ptr + v0.to(gl.int64) * R + (first + gl.arange(0, BR, layout=gl.SliceLayout(1, LP))) * CH)[:, None]
        kept = gl.convert_layout(keep, gl.SliceLayout(1, LP))
        gl.store(
            at + gl.arange(0, CH, layout=gl.SliceLayout(0, LP))[None, :], gl.convert_layout(moved, LP), mask=kept[:, None]
        )
    else:
        cols = gl.arange(0, CH, layout=gl.SliceLayout(0, L))[None, :]
        base = (logits_ptr + v0.to(gl.int64) * R + (first + gl.arange(0, BR, layout=gl.SliceLayout(1, L))) * (V - v0))[
            :, None
        ]
        gl.store(base + cols, acc, mask=keep[:, None] & (v0 + cols < V))


@gluon.jit
def _consume(
    group: gl.constexpr,
    xs,
    shared_xs,
    ws,
    ready,
    free,
    banned_ptr,
    threshold_ptr,
    flag_ptr,
    partial_ptr,
    banned_logit_ptr,
    logits_ptr,
    tiles,
    R,
    V,
    STEPS: gl.constexpr,
    BV: gl.constexpr,
    BR: gl.constexpr,
    BR2: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
    PACK: gl.constexpr,
):
    """Group 0 or 1: its own BR rows by all BV logits of a tile, and the BR2 shared rows by its half of the logits."""
    CH: gl.constexpr = BV // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    LH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CH, 16])
    ROWS: gl.constexpr = 2 * BR + BR2
    row_tiles = gl.cdiv(R, ROWS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v0 = tile // row_tiles * BV
        first = tile % row_tiles * ROWS
        own = first + group * BR
        shared = first + 2 * BR
        mine = v0 + group * CH  # the shared rows' tokens
        rare = v0 + BV > V
        if HAS_BANNED:
            rare |= gl.load(flag_ptr + tile // row_tiles) != 0
        acc = gl.zeros((BR, BV), gl.float32, layout=L)
        if BR2 > 0:
            acc2 = gl.zeros((BR2, CH), gl.float32, layout=LH)
        for step in range(STEPS - 1):
            mbarrier.wait(ready.index(stage), phase)
            w = ws.index(stage)
            acc = warpgroup_mma(xs.index(stage * 2 + group), w.permute((1, 0)), acc, is_async=True)
            if BR2 > 0:
                acc2 = warpgroup_mma(shared_xs.index(stage), w.slice(group * CH, CH, 0).permute((1, 0)), acc2, is_async=True)
                acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            # the products of the step before are done: its stage may be filled again
            mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        # asked for while the last products run
        threshold = gl.zeros((BR,), gl.int32, layout=gl.SliceLayout(1, LH))
        if GATED:
            bounds = _bounds(threshold_ptr, own, R, BR, GROUPS)
        if BR2 > 0:
            threshold2 = gl.zeros((BR2,), gl.int32, layout=gl.SliceLayout(1, LH))
            if GATED:
                bounds2 = _bounds(threshold_ptr, shared, R, BR2, GROUPS)
        mbarrier.wait(ready.index(stage), phase)
        w = ws.index(stage)
        acc = warpgroup_mma(xs.index(stage * 2 + group), w.permute((1, 0)), acc, is_async=True)
        if BR2 > 0:
            acc2 = warpgroup_mma(shared_xs.index(stage), w.slice(group * CH, CH, 0).permute((1, 0)), acc2, is_async=True)
            acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), count=1, pred=STEPS > 1)
        if GATED:
            threshold = _least(bounds, LH)
            if BR2 > 0:
                threshold2 = _least(bounds2, LH)
        if BR2 > 0:
            acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        low, high = gl.split(gl.permute(gl.reshape(acc, (BR, 2, CH)), (0, 2, 1)))
        low = gl.convert_layout(low, LH, assert_trivial=True)
        high = gl.convert_layout(high, LH, assert_trivial=True)
        if rare:
            low = _take_out(low, banned_ptr, banned_logit_ptr, v0, own, R, V, CH, BR, HAS_BANNED, LH)
            high = _take_out(high, banned_ptr, banned_logit_ptr, v0 + CH, own, R, V, CH, BR, HAS_BANNED, LH)
            if BR2 > 0:
                acc2 = _take_out(acc2, banned_ptr, banned_logit_ptr, mine, shared, R, V, CH, BR2, HAS_BANNED, LH)
        order_low, live_low = _tell(
            low, threshold, threshold_ptr, partial_ptr, v0, own, R, V, PACK, CH, BR, GROUPS, GATED, LH
        )
        order_high, live_high = _tell(
            high, threshold, threshold_ptr, partial_ptr, v0 + CH, own, R, V, PACK, CH, BR, GROUPS, GATED, LH
        )
        if BR2 > 0:
            order2, live2 = _tell(
                acc2, threshold2, threshold_ptr, partial_ptr, mine, shared, R, V, PACK, CH, BR2, GROUPS, GATED, LH
            )
        _save(low, order_low, live_low, threshold, logits_ptr, v0, own, R, V, CH, BR, GATED, LH)
        _save(high, order_high, live_high, threshold, logits_ptr, v0 + CH, own, R, V, CH, BR, GATED, LH)
        if BR2 > 0:
            _save(acc2, order2, live2, threshold2, logits_ptr, mine, shared, R, V, CH, BR2, GATED, LH)


@gluon.jit
def _produce(
    x,
    w,
    x_rest,
    xs,
    shared_xs,
    ws,
    ready,
    free,
    tiles,
    R,
    D: gl.constexpr,
    BV: gl.constexpr,
    BR: gl.constexpr,
    BR2: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill stages in the order in which they are used, each as soon as both groups have left it."""
    ROWS: gl.constexpr = 2 * BR + BR2
    STAGE_BYTES: gl.constexpr = (ROWS + BV) * BK * 2
    row_tiles = gl.cdiv(R, ROWS)
    stage = 0
    phase = 1  # a fresh barrier counts as having completed the phase before
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v0 = tile // row_tiles * BV
        first = tile % row_tiles * ROWS
        for start in range(0, D, BK):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, STAGE_BYTES)
            tma.async_copy_global_to_shared(w, [v0, start], bar, ws.index(stage))
            tma.async_copy_global_to_shared(x, [first, start], bar, xs.index(stage * 2))
            tma.async_copy_global_to_shared(x, [first + BR, start], bar, xs.index(stage * 2 + 1))
            if BR2 > 0:
                tma.async_copy_global_to_shared(x_rest, [first + 2 * BR, start], bar, shared_xs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit(do_not_specialize=["R", "tiles"])
def head_specialized_kernel(
    x,
    w,
    x_rest,
    banned_ptr,
    threshold_ptr,
    flag_ptr,
    partial_ptr,
    banned_logit_ptr,
    logits_ptr,
    R,
    V,
    tiles,
    D: gl.constexpr,
    BV: gl.constexpr,
    BR: gl.constexpr,
    BR2: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    PACK: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One program works off every num_programs-th tile of BV logits x (2 BR + BR2) rows. x, w and x_rest are tensor
    descriptors of blocks [BR, BK], [BV, BK] and [BR2, BK]; reads past the end give zeros."""
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * 2, BR, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BV, BK], w.layout)
    shared_xs = xs
    if BR2 > 0:
        shared_xs = gl.allocate_shared_memory(x_rest.dtype, [STAGES, BR2, BK], x_rest.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], gl.int32, False, 1)
        # The next kernel is not let in early: its programs would crowd into the multiprocessors that finish first.
    STEPS: gl.constexpr = (D + BK - 1) // BK
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    xs,
                    shared_xs,
                    ws,
                    ready,
                    free,
                    banned_ptr,
                    threshold_ptr,
                    flag_ptr,
                    partial_ptr,
                    banned_logit_ptr,
                    logits_ptr,
                    tiles,
                    R,
                    V,
                    STEPS,
                    BV,
                    BR,
                    BR2,
                    STAGES,
                    GROUPS,
                    HAS_BANNED,
                    GATED,
                    PACK,
                ),
            ),
            (
                _consume,
                (
                    1,
                    xs,
                    shared_xs,
                    ws,
                    ready,
                    free,
                    banned_ptr,
                    threshold_ptr,
                    flag_ptr,
                    partial_ptr,
                    banned_logit_ptr,
                    logits_ptr,
                    tiles,
                    R,
                    V,
                    STEPS,
                    BV,
                    BR,
                    BR2,
                    STAGES,
                    GROUPS,
                    HAS_BANNED,
                    GATED,
                    PACK,
                ),
            ),
            (_produce, (x, w, x_rest, xs, shared_xs, ws, ready, free, tiles, R, D, BV, BR, BR2, BK, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
