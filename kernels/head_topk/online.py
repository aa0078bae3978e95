"""The first launch of `head_topk` on Hopper for many rows of 16 bits: every 64 rows have a group of four warps of their own.

A program lives as long as the launch and works off tiles of CH tokens by all of its rows, in a ring of shared memory that
its last group fills; what groups make of their products (`online_results`) overlaps with what the others still multiply.
Sums of exponentials stay in registers, relative to the largest logit so far (online softmax), until the end. Rows are the M
side of each product. Gluon has no interpreter; `kernel.head_chunk_kernel` is the plain twin.

R rows, R_pad rows of all groups (what lies past R is written to scratch, and read by nobody), D features, V vocabulary, C
chunks of CH tokens, P programs that share a row's tokens. Handed over: thresholds int32[R_pad, GROUPS], tops fp32[C / PACK,
R_pad, PACK] (largest logit that a row may choose of a chunk), sums fp32[P, R_pad, 2] (largest logit, and the sum of
exponentials relative to it, of what a program saw), logits as in `kernel`.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate

from kernels.dependency import wait_for_kernels_before
from kernels.head_topk.online_results import CH, LANES, LOG2E, RL, ROWS, WIDE, Memory, Mode, ask_thresholds, least, work_off
from kernels.head_topk.ring import stage_after


@aggregate
class Ring:
    """Stages of BK features of GROUPS * ROWS rows and CH tokens, with what says that they are full or free."""

    xs: gl.shared_memory_descriptor
    ws: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    GROUPS: gl.constexpr
    STAGES: gl.constexpr
    STEPS: gl.constexpr
    BK: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, xs, ws, ready, free, GROUPS, STAGES, STEPS, BK):
        self.xs = xs
        self.ws = ws
        self.ready = ready
        self.free = free
        self.GROUPS = gl.constexpr(GROUPS)
        self.STAGES = gl.constexpr(STAGES)
        self.STEPS = gl.constexpr(STEPS)
        self.BK = gl.constexpr(BK)


@gluon.jit
def _load_weights(w, ring, tile, row_tiles, step, stage):
    """Expect all of a stage, and ask for its weights."""
    full = ring.ready.index(stage)
    mbarrier.expect(full, (ring.GROUPS * ROWS + CH) * ring.BK * 2)
    tma.async_copy_global_to_shared(w, [tile // row_tiles * CH, step * ring.BK], full, ring.ws.index(stage))


@gluon.jit
def _load_rows(x, ring, tile, row_tiles, step, stage):
    first = tile % row_tiles * (ring.GROUPS * ROWS)
    for group in gl.static_range(ring.GROUPS):
        rows = ring.xs.index(stage * ring.GROUPS + group)
        tma.async_copy_global_to_shared(x, [first + group * ROWS, step * ring.BK], ring.ready.index(stage), rows)


@gluon.jit
def _fill(x, w, ring, tiles, row_tiles, OVERLAP: gl.constexpr):
    """All stages, for the first time; weights do not wait for the kernels before."""
    for ahead in gl.static_range(ring.STAGES):
        tile = gl.program_id(0) + ahead // ring.STEPS * gl.num_programs(0)
        if tile < tiles:
            _load_weights(w, ring, tile, row_tiles, ahead % ring.STEPS, ahead)
    wait_for_kernels_before(OVERLAP)
    for ahead in gl.static_range(ring.STAGES):
        tile = gl.program_id(0) + ahead // ring.STEPS * gl.num_programs(0)
        if tile < tiles:
            _load_rows(x, ring, tile, row_tiles, ahead % ring.STEPS, ahead)


@gluon.jit
def _refill(x, w, ring, tiles, row_tiles, tile, step, stage, phase):
    """A stage gets what is due at `step`, counted from this tile's first, as soon as every group has left it."""
    tile += step // ring.STEPS * gl.num_programs(0)
    if tile < tiles:
        mbarrier.wait(ring.free.index(stage), phase)
        _load_weights(w, ring, tile, row_tiles, step % ring.STEPS, stage)
        _load_rows(x, ring, tile, row_tiles, step % ring.STEPS, stage)


@gluon.jit
def _multiply(group: gl.constexpr, ring, stage, phase, acc):
    """Begin the products of one stage."""
    mbarrier.wait(ring.ready.index(stage), phase)
    rows = ring.xs.index(stage * ring.GROUPS + group)
    return warpgroup_mma(rows, ring.ws.index(stage).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _work(group: gl.constexpr, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP: gl.constexpr):
    """One group: its ROWS rows by every num_programs-th tile. The launcher sees to it that these are of the same rows."""
    STAGES: gl.constexpr = ring.STAGES
    STEPS: gl.constexpr = ring.STEPS
    LOADS: gl.constexpr = group == ring.GROUPS - 1
    row_tiles = gl.cdiv(memory.R, ring.GROUPS * ROWS)
    padded = row_tiles * (ring.GROUPS * ROWS)
    first = (gl.program_id(0) % row_tiles * ring.GROUPS + group) * ROWS
    rows = first + gl.arange(0, ROWS, layout=RL)  # further down, ptxas (Triton 3.6 and 3.7) spills registers over it
    peak = gl.full((ROWS, 4), float("-inf"), gl.float32, layout=LANES)
    total = gl.zeros((ROWS, 4), gl.float32, layout=LANES)
    if LOADS:
        _fill(x, w, ring, tiles, row_tiles, OVERLAP)
    else:
        wait_for_kernels_before(OVERLAP)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        v0 = tile // row_tiles * CH
        rare = tile < 0
        if mode.HAS_BANNED:
            rare = gl.load(flag_ptr + tile // row_tiles) != 0
        acc = gl.zeros((ROWS, CH), gl.float32, layout=WIDE)
        for step in range(STEPS - 1):
            acc = warpgroup_mma_wait(1, deps=(_multiply(group, ring, stage, phase, acc),))
            # the products of the step before are done: its stage may be filled again
            last = (stage + STAGES - 1) % STAGES
            mbarrier.arrive(ring.free.index(last), count=1, pred=step > 0)
            if LOADS:  # noqa: SIM102 (the outer one is decided while compiling)
                if step > 0:
                    parity = gl.where(stage == 0, phase ^ 1, phase)
                    _refill(x, w, ring, tiles, row_tiles, tile, step + STAGES - 1, last, parity)
            stage, phase = stage_after(stage, phase, ring)
        bounds = 0
        if mode.GATED:  # asked for while the last products run
            bounds = ask_thresholds(first, memory, mode)
        acc = warpgroup_mma_wait(1, deps=(_multiply(group, ring, stage, phase, acc),))
        if STEPS > 1:
            last = (stage + STAGES - 1) % STAGES
            mbarrier.arrive(ring.free.index(last), count=1)
            if LOADS:
                parity = gl.where(stage == 0, phase ^ 1, phase)
                _refill(x, w, ring, tiles, row_tiles, tile, STEPS + STAGES - 2, last, parity)
        threshold = 0
        if mode.GATED:
            threshold = least(bounds)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(ring.free.index(stage), count=1)
        if LOADS:  # the others multiply on while this group works off its results
            _refill(x, w, ring, tiles, row_tiles, tile, STEPS + STAGES - 1, stage, phase)
        stage, phase = stage_after(stage, phase, ring)
        if v0 + CH > memory.V:
            v = v0 + gl.arange(0, CH, layout=gl.SliceLayout(0, WIDE))
            acc = gl.where((v < memory.V)[None, :], acc, float("-inf"))
        early = tile == gl.program_id(0)
        peak, total = work_off(acc, peak, total, rare, early, threshold, v0, first, padded, memory, mode)
    top = gl.max(peak, 1)
    shift = gl.where(top == float("-inf"), 0.0, top)
    whole = gl.sum(total * gl.exp2((peak - gl.expand_dims(shift, 1)) * LOG2E), 1)
    at = sums_ptr + (gl.program_id(0) // row_tiles * padded + rows) * 2
    gl.store(at, gl.convert_layout(top, RL))
    gl.store(at + 1, gl.convert_layout(whole, RL))


@gluon.jit(do_not_specialize=["R", "tiles"])
def head_online_kernel(
    x,
    w,
    banned_ptr,
    threshold_ptr,
    flag_ptr,
    tops_ptr,
    sums_ptr,
    logits_ptr,
    R,
    V,
    tiles,
    D: gl.constexpr,
    ROW_GROUPS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    PACK: gl.constexpr,
    HAS_BANNED: gl.constexpr,
    GATED: gl.constexpr,
    REGISTERS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One program works off every num_programs-th tile of CH logits x (ROW_GROUPS * ROWS) rows. x and w are tensor
    descriptors of blocks [ROWS, BK] and [CH, BK]; reads past the end give zeros. num_programs is a multiple of the number of
    tiles of rows."""
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * ROW_GROUPS, ROWS, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, CH, BK], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=ROW_GROUPS)
    ring = Ring(xs, ws, ready, free, ROW_GROUPS, STAGES, (D + BK - 1) // BK, BK)
    memory = Memory(banned_ptr, threshold_ptr, tops_ptr, logits_ptr, R, gl.to_tensor(V))
    mode = Mode(GROUPS, PACK, HAS_BANNED, GATED)
    # Every group waits for the kernels before. The next kernel is not let in early: its programs would crowd into the
    # multiprocessors that finish first.
    if ROW_GROUPS == 2:
        gl.warp_specialize(
            [
                (_work, (0, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4],
            [REGISTERS],
        )
    elif ROW_GROUPS == 3:
        gl.warp_specialize(
            [
                (_work, (0, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (2, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    elif ROW_GROUPS == 4:
        gl.warp_specialize(
            [
                (_work, (0, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (2, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (3, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_work, (0, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (1, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (2, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (3, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
                (_work, (4, x, w, ring, flag_ptr, sums_ptr, tiles, memory, mode, OVERLAP)),
            ],
            [4, 4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
        )
