"""Around the products of `specialized`: what is known of rows and features before, and what becomes of the sums after.

R rows, N output features, K input features, n features and r rows of a program's tile; MODE: see epilogue.py. Statistics of
a chunk of CHUNK features of a row: its mean, and the sum of squared distances to it; [R, 2, K / CHUNK].
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from kernels.row_statistics import CHUNK as _CHUNK

CHUNK = gl.constexpr(_CHUNK)


@aggregate
class Inputs:
    """Rows x [R, K], what belongs to features [N] (bias, column sums of a folded norm, scales of int8 weights) and to rows
    (statistics, scales of int8 codes), and the norm's epsilon."""

    x: gl.tensor
    bias: gl.tensor
    column_sums: gl.tensor
    statistics: gl.tensor
    scales: gl.tensor
    row_scales: gl.tensor
    eps: gl.tensor

    @gluon.constexpr_function
    def __init__(self, x, bias, column_sums, statistics, scales, row_scales, eps):
        self.x = x
        self.bias = bias
        self.column_sums = column_sums
        self.statistics = statistics
        self.scales = scales
        self.row_scales = row_scales
        self.eps = eps


@aggregate
class Target:
    """Where results go (epilogue.py), and statistics of them."""

    out: gl.tensor
    cells: gl.tensor
    rows: gl.tensor
    positions: gl.tensor
    chunks: gl.tensor
    R: gl.tensor
    num_cells: gl.tensor
    num_positions: gl.tensor

    @gluon.constexpr_function
    def __init__(self, out, cells, rows, positions, chunks, R, num_cells, num_positions):
        self.out = out
        self.cells = cells
        self.rows = rows
        self.positions = positions
        self.chunks = chunks
        self.R = R
        self.num_cells = num_cells
        self.num_positions = num_positions


@aggregate
class Products:
    """The products of the stored rows with E vectors, over a tile's features: the vectors' three parts [3, E, BN], the
    barrier that says that they are there, and where products go, parts [N / BN, R, E] (see `row_products`). E 0: none, and
    vectors and barrier stand for nothing."""

    vectors: gl.shared_memory_descriptor
    asked: gl.shared_memory_descriptor
    parts: gl.tensor
    E: gl.constexpr
    LAYOUT: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, vectors, asked, parts, E, WARPS):
        self.vectors = vectors
        self.asked = asked
        self.parts = parts
        self.E = gl.constexpr(E)
        self.LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E if E > 0 else 8, 16]))


@aggregate
class Form:
    """What is computed, in which tiles. NORM 0: none; 1: sums and squares of the rows less one of their values, from the
    tiles in shared memory while the products run; 2: from statistics [R, 2]; 3: from those of chunks. LEAVE: statistics of
    chunks of what is stored. OUT, X: layouts of a tile of out [BR, BN] and of x [BR, BK]."""

    N: gl.constexpr
    K: gl.constexpr
    BN: gl.constexpr
    BR: gl.constexpr
    BK: gl.constexpr
    WARPS: gl.constexpr
    BIAS: gl.constexpr
    NORM: gl.constexpr
    RELU: gl.constexpr
    MODE: gl.constexpr
    LEAVE: gl.constexpr
    INT8: gl.constexpr
    OUT: gl.constexpr
    X: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, N, K, BN, BR, BK, WARPS, BIAS, NORM, RELU, MODE, LEAVE, INT8):
        lanes = BN // 8 if BN < 256 else 32
        x_lanes = BK // 8 if BK < 256 else 32
        self.N = gl.constexpr(N)
        self.K = gl.constexpr(K)
        self.BN = gl.constexpr(BN)
        self.BR = gl.constexpr(BR)
        self.BK = gl.constexpr(BK)
        self.WARPS = gl.constexpr(WARPS)
        self.BIAS = gl.constexpr(BIAS)
        self.NORM = gl.constexpr(NORM)
        self.RELU = gl.constexpr(RELU)
        self.MODE = gl.constexpr(MODE)
        self.LEAVE = gl.constexpr(LEAVE)
        self.INT8 = gl.constexpr(INT8)
        self.OUT = gl.constexpr(gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0]))
        self.X = gl.constexpr(gl.BlockedLayout([1, 8], [32 // x_lanes, x_lanes], [WARPS, 1], [1, 0]))


@gluon.jit
def load_of_features(n, inputs, form):
    """(bias, column sums, scales) of features n, as far as they are needed: nobody has just written them."""
    bias = 0.0
    column_sums = 0.0
    scale = 0.0
    if form.BIAS:
        bias = gl.load(inputs.bias + n).to(gl.float32)
    if form.NORM > 0:
        column_sums = gl.load(inputs.column_sums + n)
    if form.INT8:
        scale = gl.load(inputs.scales + n)
    return bias, column_sums, scale


@gluon.jit
def load_of_target(r, n, live, mask, target, form):
    """(residual, cache row, position), as far as MODE needs them."""
    old = 0.0
    row = 0
    position = 0
    if form.MODE == 1:
        old = gl.load(target.out + r.to(gl.int64)[:, None] * form.N + n[None, :], mask=mask, other=0.0)
    if form.MODE == 2:
        row = gl.load(target.rows + r, mask=live, other=-1)
        position = gl.load(target.positions + r, mask=live, other=-1)
    return old, row, position


@gluon.jit
def load_statistics(row0, r, live, R, inputs, form):
    """What a norm needs of the rows before the products: (a value of each, nothing), (mean, 1 / standard deviation) or, of
    their chunks, (means, squared distances)."""
    a = 0.0
    b = 0.0
    if form.NORM == 1:
        x_row = row0 + gl.arange(0, form.BR, gl.SliceLayout(1, form.X))
        a = gl.load(inputs.x + x_row.to(gl.int64) * form.K, mask=x_row < R, other=0.0).to(gl.float32)
    elif form.NORM == 2:
        a = gl.load(inputs.statistics + r * 2, mask=live, other=0.0)
        b = gl.load(inputs.statistics + r * 2 + 1, mask=live, other=0.0)
    elif form.NORM == 3:
        CHUNKS: gl.constexpr = form.K // CHUNK
        C: gl.constexpr = gl.BlockedLayout([1, 4], [128 // CHUNKS, CHUNKS // 4], [form.WARPS, 1], [1, 0])
        c_row = row0 + gl.arange(0, form.BR, gl.SliceLayout(1, C))
        at = c_row[:, None] * (2 * CHUNKS) + gl.arange(0, CHUNKS, gl.SliceLayout(0, C))[None, :]
        c_live = (c_row < R)[:, None] & (at >= 0)
        a = gl.load(inputs.statistics + at, mask=c_live, other=0.0)
        b = gl.load(inputs.statistics + at + CHUNKS, mask=c_live, other=0.0)
    return a, b


@gluon.jit
def mean_and_rstd(a, b, sums, squares, eps, form):
    """Mean and 1 / standard deviation of the rows, from `load_statistics` and the sums of the loop."""
    if form.NORM == 1:
        left = gl.sum(sums, 1) / form.K
        variance = gl.sum(squares, 1) / form.K - left * left
        mean = gl.convert_layout(left + a, gl.SliceLayout(1, form.OUT))
        rstd = gl.convert_layout(gl.rsqrt(gl.where(variance < 0.0, 0.0, variance) + eps), gl.SliceLayout(1, form.OUT))
    elif form.NORM == 3:
        whole = gl.sum(a, 1) / (form.K // CHUNK)
        apart = a - whole[:, None]
        variance = (gl.sum(b, 1) + CHUNK * gl.sum(apart * apart, 1)) / form.K
        mean = gl.convert_layout(whole, gl.SliceLayout(1, form.OUT))
        rstd = gl.convert_layout(gl.rsqrt(variance + eps), gl.SliceLayout(1, form.OUT))
    else:
        mean = a
        rstd = b
    return mean, rstd


@gluon.jit
def leave_statistics(done, row0, n0, target, form):
    """Statistics of the chunks of a finished tile [BR, BN], for the norm that reads it next."""
    HELD: gl.constexpr = form.BN // CHUNK
    CHUNKS: gl.constexpr = form.N // CHUNK
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [form.WARPS, 1], [1, 0])
    stored = gl.reshape(done.to(gl.float32), (form.BR, HELD, CHUNK))
    mean = gl.sum(stored, 2) / CHUNK
    away = stored - gl.expand_dims(mean, 2)
    row = row0 + gl.arange(0, form.BR, gl.SliceLayout(1, L))
    chunk = n0 // CHUNK + gl.arange(0, HELD, gl.SliceLayout(0, L))
    pointers = target.chunks + row[:, None] * (2 * CHUNKS) + chunk[None, :]
    mask = (row < target.R)[:, None] & (chunk >= 0)[None, :]
    gl.store(pointers, gl.convert_layout(mean, L), mask=mask)
    gl.store(pointers + CHUNKS, gl.convert_layout(gl.sum(away * away, 2), L), mask=mask)


@gluon.jit
def products_of_stored(done, products, form):
    """The products [BR, E] of a finished tile [BR, BN] with the vectors, not waited for: statistics and stores hide them."""
    stored = gl.convert_layout(done, gl.DotOperandLayout(0, products.LAYOUT, 2))
    mbarrier.wait(products.asked, 0)
    part = warpgroup_mma_init(gl.zeros((form.BR, products.E), gl.float32, products.LAYOUT))
    for third in gl.static_range(3):  # the smallest first
        part = warpgroup_mma(stored, products.vectors.index(2 - third).permute((1, 0)), part, is_async=True)
    return part


@gluon.jit
def leave_products(part, row0, n0, R, products, form):
    """Wait for the products of `products_of_stored` and store them."""
    part = warpgroup_mma_wait(0, deps=[part])
    row = row0 + gl.arange(0, form.BR, gl.SliceLayout(1, products.LAYOUT))
    vector = gl.arange(0, products.E, gl.SliceLayout(0, products.LAYOUT))
    at = (n0 // form.BN * R + row)[:, None] * products.E + vector[None, :]
    gl.store(products.parts + at, part, mask=(row < R)[:, None] & (vector >= 0)[None, :])


@gluon.jit
def store(done, r, n, n0, row, position, mask, target, form):
    """A finished tile to out, or keys and values to the cells of their rows. A tile lies on one side of the end of the
    queries."""
    if form.MODE < 2:
        gl.store(target.out + r.to(gl.int64)[:, None] * form.N + n[None, :], done, mask=mask)
    else:
        D: gl.constexpr = form.N // 3
        if n0 < D:
            gl.store(target.out + r.to(gl.int64)[:, None] * D + n[None, :], done, mask=mask)
        else:
            inside = (row >= 0) & (row < target.num_cells) & (position >= 0) & (position < target.num_positions)
            cell = row.to(gl.int64) * target.num_positions + position
            gl.store(target.cells + cell[:, None] * (2 * D) + (n - D)[None, :], done, mask=mask & inside[:, None])
