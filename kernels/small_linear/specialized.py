"""Linear map on Hopper for 16-bit weights, with a loading warp: weights are in shared memory before the rows may be read.

One warp brings tiles of weights and of rows through the copy engine into a ring of shared memory, the others multiply. It
asks for the weights of the whole ring first and then waits for the kernel before: in a chain of overlapping launches they
arrive while that kernel still runs, and what is left after the wait is the rows. Without a loading warp the same loop is
slower than `kernel.small_linear_kernel`: the compiler puts two barriers of all warps around every copy.
The wide side of each product is the rows where a tile has 64 or more of them, else the features. Gluon has no interpreter;
`kernel.small_linear_kernel` is the plain twin. R rows, N output features, K input features; MODE: see epilogue.py.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.row_statistics import CHUNK as _CHUNK

CHUNK = gl.constexpr(_CHUNK)
PREFETCH_PTX = gl.constexpr(
    "{.reg .pred p; elect.sync _|p, 0xffffffff; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}"
)


@gluon.jit
def _produce(
    x,
    w,
    w_ptr,
    xs,
    ws,
    ready,
    free,
    row0,
    n0,
    K: gl.constexpr,
    BN: gl.constexpr,
    BR: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    PREFETCH: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Fill the ring: weights of all stages, then rows, then both as stages become free. One barrier counts both."""
    STEPS: gl.constexpr = K // BK
    SIZE: gl.constexpr = ws.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = (BN + BR) * BK * SIZE
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            mbarrier.expect(ready.index(stage), BYTES)
            tma.async_copy_global_to_shared(w, [n0, stage * BK], ready.index(stage), ws.index(stage))
    if PREFETCH and STAGES < STEPS:  # noqa: SIM102 (the outer one is decided while compiling)
        if row0 == 0:
            strip = (w_ptr + n0.to(gl.int64) * K).to(gl.int64)
            gl.inline_asm_elementwise(PREFETCH_PTX, "=r,l,r", [strip, gl.to_tensor(BN * K * SIZE)], gl.int32, False, 1)
    if OVERLAP:
        gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], gl.int32, False, 1)
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            tma.async_copy_global_to_shared(x, [row0, stage * BK], ready.index(stage), xs.index(stage))
    for step in range(STAGES, STEPS):
        at = step % STAGES
        mbarrier.wait(free.index(at), (step // STAGES - 1) & 1)
        mbarrier.expect(ready.index(at), BYTES)
        tma.async_copy_global_to_shared(w, [n0, step * BK], ready.index(at), ws.index(at))
        tma.async_copy_global_to_shared(x, [row0, step * BK], ready.index(at), xs.index(at))


@gluon.jit
def _consume(
    xs,
    ws,
    ready,
    free,
    x_ptr,
    bias_ptr,
    column_sums_ptr,
    statistics_ptr,
    chunks_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    cells_ptr,
    rows_ptr,
    positions_ptr,
    R,
    num_cells,
    num_positions,
    eps,
    row0,
    n0,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BR: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    NORM: gl.constexpr,
    RELU: gl.constexpr,
    MODE: gl.constexpr,
    LEAVE: gl.constexpr,
    OVERLAP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Products, norm, bias, ReLU, target. NORM 0: none; 1: sums and squares of the rows less one of their values, from the
    tiles in shared memory while the products run; 2: from statistics [R, 2]; 3: from those of chunks of 64 features [R, 2,
    K / 64]. LEAVE: such statistics of what is stored go to chunks. int8 rows and weights: summed in int32, then times the
    scales of row and feature."""
    INT8: gl.constexpr = xs.dtype == gl.int8
    SUM: gl.constexpr = gl.int32 if INT8 else gl.float32
    STEPS: gl.constexpr = K // BK
    ROWS_WIDE: gl.constexpr = BR >= 64
    WIDE: gl.constexpr = BR if ROWS_WIDE else BN
    NARROW: gl.constexpr = BN if ROWS_WIDE else BR
    WARPS_WIDE: gl.constexpr = WARPS if WIDE >= 16 * WARPS else WIDE // 16
    INSTRUCTION: gl.constexpr = NARROW * WARPS_WIDE // WARPS
    DEPTH: gl.constexpr = 32 if INT8 else 16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS_WIDE, WARPS // WARPS_WIDE], [16, INSTRUCTION, DEPTH])
    LANES: gl.constexpr = BN // 8 if BN < 256 else 32
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    X_LANES: gl.constexpr = BK // 8 if BK < 256 else 32
    X: gl.constexpr = gl.BlockedLayout([1, 8], [32 // X_LANES, X_LANES], [WARPS, 1], [1, 0])
    n = n0 + gl.arange(0, BN, gl.SliceLayout(0, OUT))
    r = row0 + gl.arange(0, BR, gl.SliceLayout(1, OUT))
    live = r < R
    mask = live[:, None] & (n >= 0)[None, :]
    if BIAS:
        bias = gl.load(bias_ptr + n).to(gl.float32)
    if NORM > 0:
        column_sums = gl.load(column_sums_ptr + n)
    if INT8:
        scale = gl.load(scale_ptr + n)
    if OVERLAP:  # all but the weights may have been written by the kernel before
        gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], gl.int32, False, 1)
    if MODE == 1:
        old = gl.load(out_ptr + r.to(gl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
    if MODE == 2:
        row = gl.load(rows_ptr + r, mask=live, other=-1)
        position = gl.load(positions_ptr + r, mask=live, other=-1)
    if NORM == 1:
        x_row = row0 + gl.arange(0, BR, gl.SliceLayout(1, X))
        shift = gl.load(x_ptr + x_row.to(gl.int64) * K, mask=x_row < R, other=0.0).to(gl.float32)
        sums = gl.zeros((BR, BK), gl.float32, X)
        squares = gl.zeros((BR, BK), gl.float32, X)
    elif NORM == 2:
        mean = gl.load(statistics_ptr + r * 2, mask=live, other=0.0)
        rstd = gl.load(statistics_ptr + r * 2 + 1, mask=live, other=0.0)
    elif NORM == 3:
        CHUNKS: gl.constexpr = K // CHUNK
        C: gl.constexpr = gl.BlockedLayout([1, 4], [128 // CHUNKS, CHUNKS // 4], [WARPS, 1], [1, 0])
        c_row = row0 + gl.arange(0, BR, gl.SliceLayout(1, C))
        c_at = c_row[:, None] * (2 * CHUNKS) + gl.arange(0, CHUNKS, gl.SliceLayout(0, C))[None, :]
        c_live = (c_row < R)[:, None] & (c_at >= 0)
        means = gl.load(statistics_ptr + c_at, mask=c_live, other=0.0)
        deviations = gl.load(statistics_ptr + c_at + CHUNKS, mask=c_live, other=0.0)
    if INT8:
        row_scale = gl.load(row_scale_ptr + r, mask=live, other=0.0)
    acc = warpgroup_mma_init(gl.zeros((WIDE, NARROW), SUM, ACC))
    for step in range(STEPS):
        at = step % STAGES
        mbarrier.wait(ready.index(at), (step // STAGES) & 1)
        if ROWS_WIDE:
            acc = warpgroup_mma(xs.index(at), ws.index(at).permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(ws.index(at), xs.index(at).permute((1, 0)), acc, is_async=True)
        if NORM == 1:
            tile = xs.index(at).load(X).to(gl.float32) - shift[:, None]
            sums += tile
            squares += tile * tile
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        if STAGES < STEPS:  # the products of the step before are done: its stage may be filled again
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    y = warpgroup_mma_wait(0, deps=[acc])
    if not ROWS_WIDE:
        y = gl.permute(y, (1, 0))
    y = gl.convert_layout(y, OUT)
    if INT8:
        y = y.to(gl.float32) * row_scale[:, None] * scale[None, :]
    if NORM == 1:
        left = gl.sum(sums, 1) / K
        variance = gl.sum(squares, 1) / K - left * left
        mean = gl.convert_layout(left + shift, gl.SliceLayout(1, OUT))
        rstd = gl.convert_layout(gl.rsqrt(gl.where(variance < 0.0, 0.0, variance) + eps), gl.SliceLayout(1, OUT))
    elif NORM == 3:
        whole = gl.sum(means, 1) / CHUNKS
        apart = means - whole[:, None]
        variance = (gl.sum(deviations, 1) + CHUNK * gl.sum(apart * apart, 1)) / K
        mean = gl.convert_layout(whole, gl.SliceLayout(1, OUT))
        rstd = gl.convert_layout(gl.rsqrt(variance + eps), gl.SliceLayout(1, OUT))
    if NORM > 0:
        y = (y - column_sums[None, :] * mean[:, None]) * rstd[:, None]
    if BIAS:
        y += bias[None, :]
    if RELU:
        y = gl.where(y < 0.0, 0.0, y)  # keeps NaN, as torch does
    if MODE == 1:
        y += old.to(gl.float32)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if dtype == gl.float16:
        y = gl.where(y >= 65520.0, 64504.0, gl.where(y <= -65520.0, -64504.0, y))
    done = y.to(dtype)
    if LEAVE:
        HELD: gl.constexpr = BN // CHUNK
        L: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [WARPS, 1], [1, 0])
        stored = gl.reshape(done.to(gl.float32), (BR, HELD, CHUNK))
        chunk_mean = gl.sum(stored, 2) / CHUNK
        away = stored - gl.expand_dims(chunk_mean, 2)
        c_row = row0 + gl.arange(0, BR, gl.SliceLayout(1, L))
        chunk = n0 // CHUNK + gl.arange(0, HELD, gl.SliceLayout(0, L))
        chunk_ptrs = chunks_ptr + c_row[:, None] * (2 * (N // CHUNK)) + chunk[None, :]
        c_mask = (c_row < R)[:, None] & (chunk >= 0)[None, :]
        gl.store(chunk_ptrs, gl.convert_layout(chunk_mean, L), mask=c_mask)
        gl.store(chunk_ptrs + N // CHUNK, gl.convert_layout(gl.sum(away * away, 2), L), mask=c_mask)
    if MODE < 2:
        gl.store(out_ptr + r.to(gl.int64)[:, None] * N + n[None, :], done, mask=mask)
    else:  # a tile lies on one side of the end of the queries
        D: gl.constexpr = N // 3
        if n0 < D:
            gl.store(out_ptr + r.to(gl.int64)[:, None] * D + n[None, :], done, mask=mask)
        else:
            inside = (row >= 0) & (row < num_cells) & (position >= 0) & (position < num_positions)
            cell = row.to(gl.int64) * num_positions + position
            gl.store(cells_ptr + cell[:, None] * (2 * D) + (n - D)[None, :], done, mask=mask & inside[:, None])


@gluon.jit(do_not_specialize=["R", "num_cells", "num_positions"])
def specialized_linear_kernel(
    x,
    w,
    x_ptr,
    w_ptr,
    bias_ptr,
    column_sums_ptr,
    statistics_ptr,
    chunks_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    cells_ptr,
    rows_ptr,
    positions_ptr,
    R,
    num_cells,
    num_positions,
    eps,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    BR: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    NORM: gl.constexpr,
    RELU: gl.constexpr,
    MODE: gl.constexpr,
    LEAVE: gl.constexpr,
    PREFETCH: gl.constexpr,
    OVERLAP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One program = BN features x BR rows. x and w are tensor descriptors of blocks [BR, BK] and [BN, BK]; rows past R read
    as zeros. WARPS: of the multiplying part (num_warps, which the kernel's code cannot see inside a part)."""
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BR, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BN, BK], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        if STAGES < K // BK:  # else nobody waits for these: the compiler gives their memory to others, and a barrier made
            mbarrier.init(free.index(stage), count=1)  # there shows up among their data (seen with int8 rows)
    row0 = gl.program_id(0) * BR
    n0 = gl.program_id(1) * BN
    if OVERLAP:  # what waits behind this kernel may start before: it waits too
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // dummy $0", "=r", [], gl.int32, False, 1)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    xs,
                    ws,
                    ready,
                    free,
                    x_ptr,
                    bias_ptr,
                    column_sums_ptr,
                    statistics_ptr,
                    chunks_ptr,
                    scale_ptr,
                    row_scale_ptr,
                    out_ptr,
                    cells_ptr,
                    rows_ptr,
                    positions_ptr,
                    R,
                    num_cells,
                    num_positions,
                    eps,
                    row0,
                    n0,
                    N,
                    K,
                    BN,
                    BR,
                    BK,
                    STAGES,
                    BIAS,
                    NORM,
                    RELU,
                    MODE,
                    LEAVE,
                    OVERLAP,
                    WARPS,
                ),
            ),
            (_produce, (x, w, w_ptr, xs, ws, ready, free, row0, n0, K, BN, BR, BK, STAGES, PREFETCH, OVERLAP)),
        ],
        [1],
        [40],
    )
