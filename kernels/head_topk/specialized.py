"""The first launch of `head_topk` on Hopper for many rows: programs that live as long as the launch, with a loading warp.

One warp brings tiles of weights and rows into a ring of shared memory; two groups of four warps multiply them and work off
the results (`results`), while the next tile's loads fill the ring. Rows are the M side of each product. 16-bit operands are
summed in fp32, int8 codes in int32. Gluon has no interpreter; `kernel.head_chunk_kernel` is the plain twin, and says what
the launches hand over. R rows, D features, V vocabulary, BV logits a tile, in two halves ("chunks") of CH.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate

from kernels.dependency import wait_for_kernels_before
from kernels.head_topk.results import Memory, Mode, ask_row_scales, ask_scales, ask_thresholds, least, save, take_out, tell
from kernels.head_topk.ring import stage_after


@aggregate
class Ring:
    """Stages of BK features: BR rows for each group, BR2 (0: none) that both share, BV tokens; what says full and free."""

    xs: gl.shared_memory_descriptor
    shared_xs: gl.shared_memory_descriptor
    ws: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    BV: gl.constexpr
    BR: gl.constexpr
    BR2: gl.constexpr
    BK: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, xs, shared_xs, ws, ready, free, STAGES, BV, BR, BR2, BK):
        self.xs = xs
        self.shared_xs = shared_xs
        self.ws = ws
        self.ready = ready
        self.free = free
        self.STAGES = gl.constexpr(STAGES)
        self.BV = gl.constexpr(BV)
        self.BR = gl.constexpr(BR)
        self.BR2 = gl.constexpr(BR2)
        self.BK = gl.constexpr(BK)


@gluon.jit
def _multiply(group: gl.constexpr, ring, stage, phase, acc, acc2, CH: gl.constexpr):
    """Begin the products of one stage, and wait for those of the one before."""
    mbarrier.wait(ring.ready.index(stage), phase)
    w = ring.ws.index(stage)
    acc = warpgroup_mma(ring.xs.index(stage * 2 + group), w.permute((1, 0)), acc, is_async=True)
    if ring.BR2 > 0:
        half = w.slice(group * CH, CH, 0).permute((1, 0))
        acc2 = warpgroup_mma(ring.shared_xs.index(stage), half, acc2, is_async=True)
        acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
    else:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    return acc, acc2


@gluon.jit
def _consume(group: gl.constexpr, ring, flag_ptr, tiles, memory, mode, STEPS: gl.constexpr):
    """Group 0 or 1: its own BR rows by all BV logits of a tile, and the BR2 shared rows by its half of the logits."""
    CH: gl.constexpr = mode.CH
    BR: gl.constexpr = ring.BR
    BR2: gl.constexpr = ring.BR2
    STAGES: gl.constexpr = ring.STAGES
    ROWS: gl.constexpr = 2 * BR + BR2
    SUM: gl.constexpr = gl.int32 if mode.INT8 else gl.float32
    WIDTH: gl.constexpr = min(ring.BV, 128) if mode.INT8 else ring.BV  # Triton has no int8 product of 256 columns
    LW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32 if mode.INT8 else 16])
    row_tiles = gl.cdiv(memory.R, ROWS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v0 = tile // row_tiles * ring.BV
        own = tile % row_tiles * ROWS + group * BR
        shared = tile % row_tiles * ROWS + 2 * BR
        mine = v0 + group * CH  # the shared rows' tokens
        rare = v0 + ring.BV > memory.V
        if mode.HAS_BANNED:
            rare |= gl.load(flag_ptr + tile // row_tiles) != 0
        acc = gl.zeros((BR, ring.BV), SUM, layout=LW)
        acc2 = gl.zeros((BR2 if BR2 > 0 else 64, CH), SUM, layout=mode.L)
        for step in range(STEPS - 1):
            acc, acc2 = _multiply(group, ring, stage, phase, acc, acc2, CH)
            # the products of the step before are done: its stage may be filled again
            mbarrier.arrive(ring.free.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
            stage, phase = stage_after(stage, phase, ring.STAGES)
        # asked for while the last products run
        threshold = 0
        threshold2 = 0
        if mode.GATED:
            bounds = ask_thresholds(own, BR, memory, mode)
            if BR2 > 0:
                bounds2 = ask_thresholds(shared, BR2, memory, mode)
        row_scale = 1.0
        row_scale2 = 1.0
        if mode.INT8:
            scale_low = ask_scales(v0, memory, mode)
            row_scale = ask_row_scales(own, BR, memory, mode)
            if BR2 > 0:
                row_scale2 = ask_row_scales(shared, BR2, memory, mode)
        acc, acc2 = _multiply(group, ring, stage, phase, acc, acc2, CH)
        mbarrier.arrive(ring.free.index((stage + STAGES - 1) % STAGES), count=1, pred=STEPS > 1)
        if mode.GATED:
            threshold = least(bounds, mode)
            if BR2 > 0:
                threshold2 = least(bounds2, mode)
        acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        mbarrier.arrive(ring.free.index(stage), count=1)
        stage, phase = stage_after(stage, phase, ring.STAGES)
        low, high = gl.split(gl.permute(gl.reshape(acc, (BR, 2, CH)), (0, 2, 1)))
        low = gl.convert_layout(low, mode.L, assert_trivial=True)
        high = gl.convert_layout(high, mode.L, assert_trivial=True)
        if mode.INT8:
            low = low.to(gl.float32) * scale_low[None, :]
            scale_high = ask_scales(v0 + CH, memory, mode)
            high = high.to(gl.float32) * scale_high[None, :]
            if BR2 > 0:
                acc2 = acc2.to(gl.float32) * (scale_low if group == 0 else scale_high)[None, :]
        if rare:
            low = take_out(low, row_scale, v0, own, BR, memory, mode)
            high = take_out(high, row_scale, v0 + CH, own, BR, memory, mode)
            if BR2 > 0:
                acc2 = take_out(acc2, row_scale2, mine, shared, BR2, memory, mode)
        keep_low = tell(low, row_scale, threshold, v0, own, BR, memory, mode)
        keep_high = tell(high, row_scale, threshold, v0 + CH, own, BR, memory, mode)
        if BR2 > 0:
            keep2 = tell(acc2, row_scale2, threshold2, mine, shared, BR2, memory, mode)
        save(low, row_scale, keep_low, v0, own, BR, memory, mode)
        save(high, row_scale, keep_high, v0 + CH, own, BR, memory, mode)
        if BR2 > 0:
            save(acc2, row_scale2, keep2, mine, shared, BR2, memory, mode)


@gluon.jit
def _produce(x, w, x_rest, ring, tiles, R, STEPS: gl.constexpr):
    """Fill stages in the order in which they are used, each as soon as both groups have left it."""
    BR: gl.constexpr = ring.BR
    ROWS: gl.constexpr = 2 * BR + ring.BR2
    STAGE_BYTES: gl.constexpr = (ROWS + ring.BV) * ring.BK * (ring.ws.dtype.primitive_bitwidth // 8)
    row_tiles = gl.cdiv(R, ROWS)
    stage = 0
    phase = 1  # a fresh barrier counts as having completed the phase before
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v0 = tile // row_tiles * ring.BV
        first = tile % row_tiles * ROWS
        for step in range(STEPS):
            start = step * ring.BK
            mbarrier.wait(ring.free.index(stage), phase)
            full = ring.ready.index(stage)
            mbarrier.expect(full, STAGE_BYTES)
            tma.async_copy_global_to_shared(w, [v0, start], full, ring.ws.index(stage))
            tma.async_copy_global_to_shared(x, [first, start], full, ring.xs.index(stage * 2))
            tma.async_copy_global_to_shared(x, [first + BR, start], full, ring.xs.index(stage * 2 + 1))
            if ring.BR2 > 0:
                tma.async_copy_global_to_shared(x_rest, [first + 2 * BR, start], full, ring.shared_xs.index(stage))
            stage, phase = stage_after(stage, phase, ring.STAGES)


@gluon.jit(do_not_specialize=["R", "tiles"])
def head_specialized_kernel(
    x,
    w,
    x_rest,
    row_scale_ptr,
    scale_ptr,
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
    descriptors of blocks [BR, BK], [BV, BK] and [BR2, BK]; reads past the end give zeros. Scales are for int8 only."""
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
    # The next kernel is not let in early: its programs would crowd into the multiprocessors that finish first.
    wait_for_kernels_before(OVERLAP)
    ring = Ring(xs, shared_xs, ws, ready, free, STAGES, BV, BR, BR2, BK)
    memory = Memory(
        row_scale_ptr, scale_ptr, banned_ptr, threshold_ptr, partial_ptr, banned_logit_ptr, logits_ptr, R, gl.to_tensor(V)
    )
    mode = Mode(BV // 2, GROUPS, PACK, HAS_BANNED, GATED, w.dtype == gl.int8)
    STEPS: gl.constexpr = (D + BK - 1) // BK
    gl.warp_specialize(
        [
            (_consume, (0, ring, flag_ptr, tiles, memory, mode, STEPS)),
            (_consume, (1, ring, flag_ptr, tiles, memory, mode, STEPS)),
            (_produce, (x, w, x_rest, ring, tiles, R, STEPS)),
        ],
        [4, 1],
        [240, 24],
    )
