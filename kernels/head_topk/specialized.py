"""The first launch of `head_topk` on Hopper for many rows: programs that live as long as the launch, with a loading warp.

One warp brings tiles of weights and rows into a ring of shared memory; two groups of four warps multiply them and work off
the results. A group that has finished its part takes the next tile at once, so that one group's results overlap the
other's products, and the next tile's loads overlap both. Rows are the M side of each product: a row's logits then lie in
four lanes of one warp, and its maximum and sum need two shuffles. Gluon has no interpreter; `kernel.head_chunk_kernel` is
the plain twin. R rows, D features, V vocabulary, BV logits a tile, in two halves ("chunks") of CH.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _ask(
    threshold_ptr,
    banned_ptr,
    v0,
    first,
    R,
    V,
    W: gl.constexpr,
    BR: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
    L: gl.constexpr,
):
    """What results of rows first ... and logits v0 ... v0 + W need from memory: thresholds, banned tokens, whether any of
    those lies here. Asked for while the last products still run."""
    rows = first + gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    live = rows < R
    threshold = gl.zeros((BR,), gl.float32, layout=gl.SliceLayout(1, L))
    if GATED:  # least of all groups; the four lanes that hold a row share its loads
        LG: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUPS, 16])
        group = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, LG))
        at = first + gl.arange(0, BR, layout=gl.SliceLayout(1, LG))
        bounds = gl.load(
            threshold_ptr + group[None, :] * R + at[:, None], mask=(at < R)[:, None], other=0.0, cache_modifier=".cg"
        )
        threshold = gl.convert_layout(gl.min(bounds, 1), gl.SliceLayout(1, L), assert_trivial=True)
    banned = gl.zeros((BR,), gl.int32, layout=gl.SliceLayout(1, L))
    any_here = False
    if HAS_BANNED:
        banned = gl.load(banned_ptr + rows, mask=live, other=-1)
        here = (banned >= v0) & (banned < gl.minimum(v0 + W, V))
        any_here = gl.max(here.to(gl.int32), 0) > 0
    return threshold, banned, any_here


@gluon.jit
def _chunk_results(
    acc,
    threshold,
    banned,
    any_here,
    threshold_ptr,
    max_ptr,
    sum_ptr,
    banned_logit_ptr,
    logits_ptr,
    v0,
    first,
    R,
    V,
    logits_stride,
    CH: gl.constexpr,
    BR: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
    L: gl.constexpr,
):
    """As `kernel._chunk_results` for logits acc[BR, CH] of rows first ... and tokens v0 ..."""
    LOG2E: gl.constexpr = 1.4426950408889634
    cols = gl.arange(0, CH, layout=gl.SliceLayout(0, L))
    rows = first + gl.arange(0, BR, layout=gl.SliceLayout(1, L))
    live = (rows < R) & (v0 < V)  # the second half of the last tile may be empty
    chunk = v0 // CH
    whole = v0 + CH <= V
    if v0 + CH > V:
        acc = gl.where((v0 + cols < V)[None, :], acc, float("-inf"))
    if HAS_BANNED:
        here = (banned >= v0) & (banned < gl.minimum(v0 + CH, V))
        if any_here:
            hit = (v0 + cols)[None, :] == banned[:, None]
            gl.store(banned_logit_ptr + rows, gl.sum(gl.where(hit, acc, 0.0), 1), mask=here & live)
            acc = gl.where(hit & here[:, None], float("-inf"), acc)
    top = gl.max(acc, 1)
    shift = gl.where(top == float("-inf"), 0.0, top) * LOG2E
    total = gl.sum(gl.exp2(acc * LOG2E - shift[:, None]), 1)
    at = rows * gl.cdiv(V, CH) + chunk
    gl.store(max_ptr + at, top, mask=live)
    gl.store(sum_ptr + at, total, mask=live)
    keep = live
    if GATED:
        keep = live & ~(top < threshold)
        gl.atomic_max(threshold_ptr + chunk % GROUPS * R + rows, top, mask=keep, sem="relaxed")
    base = logits_ptr + rows.to(gl.int64) * logits_stride + v0
    if whole:
        gl.store(base[:, None] + cols[None, :], acc, mask=keep[:, None])
    else:
        gl.store(base[:, None] + cols[None, :], acc, mask=keep[:, None] & (v0 + cols < V)[None, :])


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
    max_ptr,
    sum_ptr,
    banned_logit_ptr,
    logits_ptr,
    tiles,
    R,
    V,
    logits_stride,
    STEPS: gl.constexpr,
    BV: gl.constexpr,
    BR: gl.constexpr,
    BR2: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
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
        acc = gl.zeros((BR, BV), gl.float32, layout=L)
        if BR2 > 0:
            acc2 = gl.zeros((BR2, CH), gl.float32, layout=LH)
        for step in range(STEPS):
            mbarrier.wait(ready.index(stage), phase)
            w = ws.index(stage)
            acc = warpgroup_mma(xs.index(stage * 2 + group), w.permute((1, 0)), acc, is_async=True)
            if BR2 > 0:
                half = w.slice(group * CH, CH, 0).permute((1, 0))
                acc2 = warpgroup_mma(shared_xs.index(stage), half, acc2, is_async=True)
                acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            # the products of the step before are done: its stage may be filled again
            mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        own = first + group * BR
        threshold, banned, any_here = _ask(threshold_ptr, banned_ptr, v0, own, R, V, BV, BR, GROUPS, HAS_BANNED, GATED, LH)
        if BR2 > 0:
            threshold2, banned2, any_here2 = _ask(
                threshold_ptr, banned_ptr, v0 + group * CH, first + 2 * BR, R, V, CH, BR2, GROUPS, HAS_BANNED, GATED, LH
            )
            acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), count=1)
        low, high = gl.split(gl.permute(gl.reshape(acc, (BR, 2, CH)), (0, 2, 1)))
        for half in gl.static_range(2):
            _chunk_results(
                gl.convert_layout(high if half else low, LH, assert_trivial=True),
                threshold,
                banned,
                any_here,
                threshold_ptr,
                max_ptr,
                sum_ptr,
                banned_logit_ptr,
                logits_ptr,
                v0 + half * CH,
                own,
                R,
                V,
                logits_stride,
                CH,
                BR,
                GROUPS,
                HAS_BANNED,
                GATED,
                LH,
            )
        if BR2 > 0:
            _chunk_results(
                acc2,
                threshold2,
                banned2,
                any_here2,
                threshold_ptr,
                max_ptr,
                sum_ptr,
                banned_logit_ptr,
                logits_ptr,
                v0 + group * CH,
                first + 2 * BR,
                R,
                V,
                logits_stride,
                CH,
                BR2,
                GROUPS,
                HAS_BANNED,
                GATED,
                LH,
            )


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
    max_ptr,
    sum_ptr,
    banned_logit_ptr,
    logits_ptr,
    R,
    V,
    logits_stride,
    tiles,
    D: gl.constexpr,
    BV: gl.constexpr,
    BR: gl.constexpr,
    BR2: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
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
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // dummy $0", "=r", [], gl.int32, False, 1)
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
                    max_ptr,
                    sum_ptr,
                    banned_logit_ptr,
                    logits_ptr,
                    tiles,
                    R,
                    V,
                    logits_stride,
                    STEPS,
                    BV,
                    BR,
                    BR2,
                    STAGES,
                    GROUPS,
                    HAS_BANNED,
                    GATED,
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
                    max_ptr,
                    sum_ptr,
                    banned_logit_ptr,
                    logits_ptr,
                    tiles,
                    R,
                    V,
                    logits_stride,
                    STEPS,
                    BV,
                    BR,
                    BR2,
                    STAGES,
                    GROUPS,
                    HAS_BANNED,
                    GATED,
                ),
            ),
            (_produce, (x, w, x_rest, xs, shared_xs, ws, ready, free, tiles, R, D, BV, BR, BR2, BK, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
