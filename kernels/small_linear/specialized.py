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
from triton.language.core import _aggregate as aggregate

from kernels.dependency import let_next_start, wait_for_kernels_before
from kernels.small_linear.specialized_rows import (
    Form,
    Inputs,
    Products,
    Target,
    leave_products,
    leave_statistics,
    load_of_features,
    load_of_target,
    load_statistics,
    mean_and_rstd,
    products_of_stored,
    store,
)

PREFETCH_PTX = gl.constexpr(
    "{.reg .pred p; elect.sync _|p, 0xffffffff; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}"
)


@aggregate
class Ring:
    """STAGES blocks of BK features: rows xs [BR, BK] and weights ws [BN, BK], and barriers that say which are ready or free.
    One barrier counts both. STEPS blocks in all."""

    xs: gl.shared_memory_descriptor
    ws: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    STEPS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, xs, ws, ready, free, STAGES, STEPS):
        self.xs = xs
        self.ws = ws
        self.ready = ready
        self.free = free
        self.STAGES = gl.constexpr(STAGES)
        self.STEPS = gl.constexpr(STEPS)


@aggregate
class Ahead:
    """PIECES pieces of SIZE bytes, STRIDE bytes apart from `start` on, of weights that a later launch begins with."""

    start: gl.tensor
    PIECES: gl.constexpr
    SIZE: gl.constexpr
    STRIDE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, start, PIECES, SIZE, STRIDE):
        self.start = start
        self.PIECES = gl.constexpr(PIECES)
        self.SIZE = gl.constexpr(SIZE)
        self.STRIDE = gl.constexpr(STRIDE)


@gluon.jit
def _ask_ahead(ahead):
    """Ask for them in L2, the launch's programs in turns."""
    start = ahead.start.to(gl.int64)
    size = gl.to_tensor(ahead.SIZE)
    program = gl.program_id(0) + gl.num_programs(0) * gl.program_id(1)
    for piece in range(program, ahead.PIECES, gl.num_programs(0) * gl.num_programs(1)):
        at = start + piece.to(gl.int64) * ahead.STRIDE
        gl.inline_asm_elementwise(PREFETCH_PTX, "=r,l,r", [at, size], gl.int32, False, 1)


@gluon.jit
def _produce(x, w, router, w_ptr, ring, products, ahead, row0, n0, form, PREFETCH: gl.constexpr, OVERLAP: gl.constexpr):
    """Fill the ring: weights of all stages, then rows, then both as stages become free. Last, what others begin with: its
    own copies come first."""
    STAGES: gl.constexpr = ring.STAGES
    STEPS: gl.constexpr = ring.STEPS
    BK: gl.constexpr = form.BK
    SIZE: gl.constexpr = ring.ws.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = (form.BN + form.BR) * BK * SIZE
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            mbarrier.expect(ring.ready.index(stage), BYTES)
            tma.async_copy_global_to_shared(w, [n0, stage * BK], ring.ready.index(stage), ring.ws.index(stage))
    if products.E > 0:
        mbarrier.expect(products.asked, 3 * products.E * form.BN * SIZE)
        for third in gl.static_range(3):
            tma.async_copy_global_to_shared(router, [third * products.E, n0], products.asked, products.vectors.index(third))
    if PREFETCH and STAGES < STEPS:  # noqa: SIM102 (the outer one is decided while compiling)
        if row0 == 0:
            strip = (w_ptr + n0.to(gl.int64) * form.K).to(gl.int64)
            size = gl.to_tensor(form.BN * form.K * SIZE)
            gl.inline_asm_elementwise(PREFETCH_PTX, "=r,l,r", [strip, size], gl.int32, False, 1)
    wait_for_kernels_before(OVERLAP)
    for stage in gl.static_range(STAGES):
        if stage < STEPS:
            tma.async_copy_global_to_shared(x, [row0, stage * BK], ring.ready.index(stage), ring.xs.index(stage))
    for step in range(STAGES, STEPS):
        at = step % STAGES
        mbarrier.wait(ring.free.index(at), (step // STAGES - 1) & 1)
        mbarrier.expect(ring.ready.index(at), BYTES)
        tma.async_copy_global_to_shared(w, [n0, step * BK], ring.ready.index(at), ring.ws.index(at))
        tma.async_copy_global_to_shared(x, [row0, step * BK], ring.ready.index(at), ring.xs.index(at))
    if ahead.PIECES > 0:
        _ask_ahead(ahead)


@gluon.jit
def _multiply(ring, shift, form):
    """Sums of products [BR, BN], and with NORM 1 sums and squares [BR, BK] of the rows less `shift`. The wide side of each
    product is the rows where there are 64 or more of them, else the features."""
    SUM: gl.constexpr = gl.int32 if form.INT8 else gl.float32
    ROWS_WIDE: gl.constexpr = form.BR >= 64
    WIDE: gl.constexpr = form.BR if ROWS_WIDE else form.BN
    NARROW: gl.constexpr = form.BN if ROWS_WIDE else form.BR
    WARPS_WIDE: gl.constexpr = form.WARPS if WIDE >= 16 * form.WARPS else WIDE // 16
    INSTRUCTION: gl.constexpr = [16, NARROW * WARPS_WIDE // form.WARPS, 32 if form.INT8 else 16]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS_WIDE, form.WARPS // WARPS_WIDE], INSTRUCTION)
    STAGES: gl.constexpr = ring.STAGES
    STEPS: gl.constexpr = ring.STEPS
    sums = gl.zeros((form.BR, form.BK), gl.float32, form.X)
    squares = gl.zeros((form.BR, form.BK), gl.float32, form.X)
    acc = warpgroup_mma_init(gl.zeros((WIDE, NARROW), SUM, ACC))
    for step in range(STEPS):
        at = step % STAGES
        mbarrier.wait(ring.ready.index(at), (step // STAGES) & 1)
        if ROWS_WIDE:
            acc = warpgroup_mma(ring.xs.index(at), ring.ws.index(at).permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(ring.ws.index(at), ring.xs.index(at).permute((1, 0)), acc, is_async=True)
        if form.NORM == 1:
            tile = ring.xs.index(at).load(form.X).to(gl.float32) - shift[:, None]
            sums += tile
            squares += tile * tile
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        if STAGES < STEPS:  # the products of the step before are done: its stage may be filled again
            mbarrier.arrive(ring.free.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    y = warpgroup_mma_wait(0, deps=[acc])
    if not ROWS_WIDE:
        y = gl.permute(y, (1, 0))
    return gl.convert_layout(y, form.OUT), sums, squares


@gluon.jit
def _consume(ring, inputs, target, products, row0, n0, form, OVERLAP: gl.constexpr):
    """Products, norm, bias, ReLU, target. What is needed after the products is asked for before them: nothing waits for it
    then. int8 rows and weights: summed in int32, then times the scales of row and feature."""
    n = n0 + gl.arange(0, form.BN, gl.SliceLayout(0, form.OUT))
    r = row0 + gl.arange(0, form.BR, gl.SliceLayout(1, form.OUT))
    live = r < target.R
    mask = live[:, None] & (n >= 0)[None, :]
    bias, column_sums, scale = load_of_features(n, inputs, form)
    wait_for_kernels_before(OVERLAP)  # all but the weights may have been written by them
    old, row, position = load_of_target(r, n, live, mask, target, form)
    a, b = load_statistics(row0, r, live, target.R, inputs, form)
    if form.INT8:
        row_scale = gl.load(inputs.row_scales + r, mask=live, other=0.0)
    y, sums, squares = _multiply(ring, a, form)
    if form.INT8:
        y = y.to(gl.float32) * row_scale[:, None] * scale[None, :]
    if form.NORM > 0:
        mean, rstd = mean_and_rstd(a, b, sums, squares, inputs.eps, form)
        y = (y - column_sums[None, :] * mean[:, None]) * rstd[:, None]
    if form.BIAS:
        y += bias[None, :]
    if form.RELU:
        y = gl.where(y < 0.0, 0.0, y)  # keeps NaN, as torch does
    if form.MODE == 1:
        y += old.to(gl.float32)
    dtype: gl.constexpr = target.out.dtype.element_ty
    if dtype == gl.float16:
        y = gl.where(y >= 65520.0, 64504.0, gl.where(y <= -65520.0, -64504.0, y))
    done = y.to(dtype)
    if products.E > 0:
        part = products_of_stored(done, products, form)
    if form.LEAVE:
        leave_statistics(done, row0, n0, target, form)
    store(done, r, n, n0, row, position, mask, target, form)
    if products.E > 0:
        leave_products(part, row0, n0, target.R, products, form)


@gluon.jit(do_not_specialize=["R", "num_cells", "num_positions"])
def specialized_linear_kernel(
    x,
    w,
    router,
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
    parts_ptr,
    ahead_ptr,
    R,
    num_cells,
    num_positions,
    eps,
    E: gl.constexpr,
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
    PIECES: gl.constexpr,
    SIZE: gl.constexpr,
    STRIDE: gl.constexpr,
    OVERLAP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One program = BN features x BR rows. x and w are tensor descriptors of blocks [BR, BK] and [BN, BK]; rows past R read
    as zeros. router: of blocks [E, BN] of the vectors' three parts. WARPS: of the multiplying part (num_warps, which the
    kernel's code cannot see inside a part)."""
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BR, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, BN, BK], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        if STAGES < K // BK:  # else nobody waits for these: the compiler gives their memory to others, and a barrier made
            mbarrier.init(free.index(stage), count=1)  # there shows up among their data (seen with int8 rows)
    vectors = ws
    asked = ready
    if E > 0:
        vectors = gl.allocate_shared_memory(router.dtype, [3, E, BN], router.layout)
        asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(asked, count=1)
    row0 = gl.program_id(0) * BR
    n0 = gl.program_id(1) * BN
    let_next_start(OVERLAP)  # what waits behind this kernel may start before: it waits too
    ring = Ring(xs, ws, ready, free, STAGES, K // BK)
    inputs = Inputs(x_ptr, bias_ptr, column_sums_ptr, statistics_ptr, scale_ptr, row_scale_ptr, eps)
    target = Target(out_ptr, cells_ptr, rows_ptr, positions_ptr, chunks_ptr, R, num_cells, num_positions)
    products = Products(vectors, asked, parts_ptr, E, WARPS)
    ahead = Ahead(ahead_ptr, PIECES, SIZE, STRIDE)
    form = Form(N, K, BN, BR, BK, WARPS, BIAS, NORM, RELU, MODE, LEAVE, x.dtype == gl.int8)
    gl.warp_specialize(
        [
            (_consume, (ring, inputs, target, products, row0, n0, form, OVERLAP)),
            (_produce, (x, w, router, w_ptr, ring, products, ahead, row0, n0, form, PREFETCH, OVERLAP)),
        ],
        [1],
        [40],
    )
