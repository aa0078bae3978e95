"""The first launch of `head_topk` on Hopper for many rows: every 64 rows have a group of four warps of their own.

A program lives as long as the launch and works off tiles of CH tokens by all of its rows. Weights lie in a ring of shared
memory that the last group fills for all; each group fills a ring of its own rows (`online_ring`), so that groups may be
apart by almost all stages of weights, and what one makes of its products (`online_results`) overlaps with what the others
still multiply.
Sums of exponentials stay in registers, relative to the largest logit so far (online softmax), until the end. Rows are the M
side of each product. 16-bit operands are summed in fp32, int8 codes in int32: then the scales of a tile's tokens come with
its first weights. Gluon has no interpreter; `kernel.head_chunk_kernel` is the plain twin.

R rows, R_pad rows of all groups (what lies past R is written to scratch, and read by nobody), D features, V vocabulary, C
chunks of CH tokens, P programs that share a row's tokens. Handed over: thresholds int32[R_pad, GROUPS], tops fp32[C / PACK,
R_pad, PACK] (largest logit that a row may choose of a chunk), sums fp32[P, R_pad, 2] (largest logit, and the sum of
exponentials relative to it, of what a program saw), logits as in `kernel`.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.dependency import wait_for_kernels_before
from kernels.head_topk.online_results import (
    CH,
    INT_WIDE,
    LANES,
    RL,
    ROWS,
    WIDE,
    Memory,
    Mode,
    ask_thresholds,
    lane_scale,
    work_off,
)
from kernels.head_topk.online_ring import Ring, load_rows, load_weights, refill_rows, refill_weights
from kernels.head_topk.ring import stage_after, stage_before


@gluon.jit
def _work(group: gl.constexpr, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP: gl.constexpr):
    """One group: its ROWS rows by every num_programs-th tile. The launcher sees to it that these are of the same rows."""
    STAGES: gl.constexpr = ring.STAGES
    X_STAGES: gl.constexpr = ring.X_STAGES
    STEPS: gl.constexpr = ring.STEPS
    LOADS: gl.constexpr = group == ring.GROUPS - 1
    row_tiles = gl.cdiv(memory.R, ring.GROUPS * ROWS)
    padded = row_tiles * (ring.GROUPS * ROWS)
    first = (gl.program_id(0) % row_tiles * ring.GROUPS + group) * ROWS
    rows = first + gl.arange(0, ROWS, layout=RL)  # further down, ptxas (Triton 3.6 and 3.7) spills registers over it
    SUM: gl.constexpr = gl.int32 if mode.INT8 else gl.float32
    L: gl.constexpr = INT_WIDE if mode.INT8 else WIDE
    peak = gl.full((ROWS, 4), float("-inf"), gl.float32, layout=LANES)
    total = gl.zeros((ROWS, 4), gl.float32, layout=LANES)
    if LOADS:  # weights do not wait for the kernels before
        for ahead in gl.static_range(STAGES):
            tile = gl.program_id(0) + ahead // STEPS * gl.num_programs(0)
            if tile < tiles:
                load_weights(w, scales, ring, ahead // STEPS, tile, row_tiles, ahead % STEPS, ahead)
    wait_for_kernels_before(OVERLAP)
    for ahead in gl.static_range(X_STAGES):
        if gl.program_id(0) + ahead // STEPS * gl.num_programs(0) < tiles:
            load_rows(group, x, ring, first, ahead % STEPS, ahead)
    row_scale = 1.0
    if mode.INT8:
        row_scale = gl.load(memory.row_scales + rows, mask=rows < memory.R, other=0.0)
    banned = -1
    if mode.HAS_BANNED:
        banned = gl.load(memory.banned + rows, mask=rows < memory.R, other=-1)
    stage = 0
    phase = 0
    x_stage = 0
    x_phase = 0
    turn = 0
    # unless told that the loop runs, ptxas (Triton 3.6 and 3.7) spills half of the sums of int8
    gl.assume(gl.program_id(0) < tiles)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v0 = tile // row_tiles * CH
        acc = gl.zeros((ROWS, CH), SUM, layout=L)
        for step in range(STEPS):
            mbarrier.wait(ring.ready.index(stage), phase)
            mbarrier.wait(ring.x_ready.index(group * X_STAGES + x_stage), x_phase)
            own = ring.xs.index(group * X_STAGES + x_stage)
            acc = warpgroup_mma(own, ring.ws.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # the products of the step before are done: its stages may be filled again
            last = stage_before(stage, STAGES)
            mbarrier.arrive(ring.free.index(last), count=1, pred=step > 0)
            if step > 0:
                refill_rows(group, x, ring, tiles, tile, first, step + X_STAGES - 1, stage_before(x_stage, X_STAGES))
                if LOADS:
                    parity = gl.where(stage == 0, phase ^ 1, phase)
                    refill_weights(w, scales, ring, tiles, row_tiles, turn, tile, step + STAGES - 1, last, parity)
            stage, phase = stage_after(stage, phase, STAGES)
            x_stage, x_phase = stage_after(x_stage, x_phase, X_STAGES)
        bounds = 0
        bounds2 = 0
        if mode.GATED:  # asked for while the last products run
            bounds, bounds2 = ask_thresholds(first, memory, mode)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        last = stage_before(stage, STAGES)
        mbarrier.arrive(ring.free.index(last), count=1)
        refill_rows(group, x, ring, tiles, tile, first, STEPS + X_STAGES - 1, stage_before(x_stage, X_STAGES))
        if LOADS:  # the others multiply on while this group works off its results
            parity = gl.where(stage == 0, phase ^ 1, phase)
            refill_weights(w, scales, ring, tiles, row_tiles, turn, tile, STEPS + STAGES - 1, last, parity)
        if mode.INT8:
            slot = ring.scales.index(turn % ring.SLOTS)
            acc = gl.convert_layout(acc.to(gl.float32), WIDE, assert_trivial=True)
            acc = acc * slot.load(gl.SliceLayout(0, WIDE))[None, :]
            if not mode.GATED:
                acc = acc * row_scale[:, None]
        if not mode.WHOLE:  # noqa: SIM102 (known when compiled, the rest is not)
            if v0 + CH > memory.V:
                v = v0 + gl.arange(0, CH, layout=gl.SliceLayout(0, WIDE))
                acc = gl.where((v < memory.V)[None, :], acc, float("-inf"))
        early = tile == gl.program_id(0)
        peak, total = work_off(acc, peak, total, row_scale, banned, early, bounds, bounds2, v0, first, padded, memory, mode)
        turn += 1  # noqa: SIM113 (Gluon has no enumerate)
    top = gl.max(peak, 1)
    shift = gl.where(top == float("-inf"), 0.0, top)
    whole = gl.sum(total * gl.exp2((peak - gl.expand_dims(shift, 1)) * lane_scale(row_scale, mode)), 1)
    if mode.LATE:
        top *= gl.convert_layout(row_scale, gl.SliceLayout(1, LANES))
    at = sums_ptr + (gl.program_id(0) // row_tiles * padded + rows) * 2
    gl.store(at, gl.convert_layout(top, RL))
    gl.store(at + 1, gl.convert_layout(whole, RL))


@gluon.jit(do_not_specialize=["R", "tiles"])
def head_online_kernel(
    x,
    w,
    banned_ptr,
    threshold_ptr,
    tops_ptr,
    sums_ptr,
    logits_ptr,
    scales,
    row_scale_ptr,
    R,
    V,
    tiles,
    D: gl.constexpr,
    ROW_GROUPS: gl.constexpr,
    BK: gl.constexpr,
    X_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    PACK: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
    WHOLE: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One program works off every num_programs-th tile of CH logits x (ROW_GROUPS * ROWS) rows. x, w and scales are tensor
    descriptors of blocks [ROWS, BK], [CH, BK] and [CH]; reads past the end give zeros. scales and row_scale_ptr are for int8
    only, else None. num_programs is a multiple of the number of tiles of rows."""
    xs = gl.allocate_shared_memory(x.dtype, [X_STAGES * ROW_GROUPS, ROWS, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, CH, BK], w.layout)
    INT8: gl.constexpr = w.dtype == gl.int8
    STEPS: gl.constexpr = (D + BK - 1) // BK
    SLOTS: gl.constexpr = 1 + (STAGES + STEPS - 1) // STEPS if INT8 else 0
    token_scales = ws  # for 16 bits, which have none
    if INT8:
        token_scales = gl.allocate_shared_memory(gl.float32, [SLOTS, CH], scales.layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [X_STAGES * ROW_GROUPS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(X_STAGES * ROW_GROUPS):
        mbarrier.init(x_ready.index(stage), count=1)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=ROW_GROUPS)
    ring = Ring(xs, ws, token_scales, x_ready, ready, free, ROW_GROUPS, X_STAGES, STAGES, STEPS, BK, SLOTS)
    row_scales = row_scale_ptr if INT8 else logits_ptr
    memory = Memory(banned_ptr, threshold_ptr, tops_ptr, logits_ptr, row_scales, R, gl.to_tensor(V))
    mode = Mode(GROUPS, PACK, HAS_BANNED, GATED, INT8, WHOLE)
    # Every group waits for the kernels before. The next kernel is not let in early: its programs would crowd into the
    # multiprocessors that finish first.
    # Gluon takes neither the group nor the function by a name of its own: these lists are written out.
    if ROW_GROUPS == 2:
        gl.warp_specialize(
            [
                (_work, (0, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4],
            [REGISTERS],
        )
    elif ROW_GROUPS == 3:
        gl.warp_specialize(
            [
                (_work, (0, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (2, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    elif ROW_GROUPS == 4:
        gl.warp_specialize(
            [
                (_work, (0, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (2, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (3, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_work, (0, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (2, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (3, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (4, x, w, scales, ring, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4, 4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
        )
