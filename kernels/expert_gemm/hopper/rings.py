"""Rings of shared memory that hold the next weights and activations, and the copies that fill them.

Weights lie in a ring of W_STEPS steps, activations in X_STEPS steps, one ring for each chunk of a step: the compiler puts a
barrier between any two accesses of one buffer, whatever the index. Both go on from one tile into the next.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.core import _aggregate as aggregate


@aggregate
class Rings:
    """w int32[slots, ROWS, 32]: one slot holds a step of ROWS output features, those of one dot; x: tuple of a ring
    [X_STEPS, BT, 64] for each of CHUNKS chunks. BY_STEP: x is copied by whole steps, not by chunks. GROUPS: groups of copies
    in flight, each of PER_GROUP chunks of x and what of the weights is due with them. SPARE: whether the accumulators leave
    registers for more than the loop needs."""

    w: gl.shared_memory_descriptor
    x: gl.tuple
    BITS: gl.constexpr
    W_STEPS: gl.constexpr
    X_STEPS: gl.constexpr
    WARPS: gl.constexpr
    BT: gl.constexpr
    ROWS: gl.constexpr
    KB: gl.constexpr
    CHUNKS: gl.constexpr
    BY_STEP: gl.constexpr
    GROUPS: gl.constexpr
    PER_GROUP: gl.constexpr
    SPARE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, w, x, BITS, W_STEPS, X_STEPS, WARPS, BT, HALVES):
        chunks = 16 // BITS
        by_step = X_STEPS > 2 and BITS == 4
        self.w = w
        self.x = x
        self.BITS = gl.constexpr(BITS)
        self.W_STEPS = gl.constexpr(W_STEPS)
        self.X_STEPS = gl.constexpr(X_STEPS)
        self.WARPS = gl.constexpr(WARPS)
        self.BT = gl.constexpr(BT)
        self.ROWS = gl.constexpr(16 * WARPS)
        self.KB = gl.constexpr(64 * chunks)
        self.CHUNKS = gl.constexpr(chunks)
        self.BY_STEP = gl.constexpr(by_step)
        self.GROUPS = gl.constexpr(X_STEPS - 1 if by_step else X_STEPS * chunks - 2)
        self.PER_GROUP = gl.constexpr(chunks if by_step else 1)
        self.SPARE = gl.constexpr(HALVES * BT <= 128)


@aggregate
class Strips:
    """An item's weights: its first strip, the words from a strip to the next, and whether there are any."""

    first: gl.tensor
    stride: gl.tensor
    there: gl.tensor

    @gluon.constexpr_function
    def __init__(self, first, stride, there):
        self.first = first
        self.stride = stride
        self.there = there


@aggregate
class CopyOfX:
    """Where copying x goes on: rows, number of pairs, first feature."""

    rows: gl.tensor
    count: gl.tensor
    k: gl.tensor

    @gluon.constexpr_function
    def __init__(self, rows, count, k):
        self.rows = rows
        self.count = count
        self.k = k


@gluon.jit
def x_lanes(rings):
    """Which pairs of a buffer [BT, 64] of x a thread copies, and which of the features."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [rings.WARPS, 1], [1, 0])
    return gl.arange(0, rings.BT, gl.SliceLayout(1, COPY)), gl.arange(0, 64, gl.SliceLayout(0, COPY))


@gluon.jit
def copy_x(rings, slot, chunk: gl.constexpr, copy, lanes, gemm):
    """Start copying the 64 features `chunk` chunks on to that chunk's ring, at `slot`; rows past the tile's pairs become
    zero. lanes: `x_lanes`."""
    buffer = rings.x[chunk % rings.CHUNKS].index(slot)
    lane, column = lanes
    k = copy.k + chunk * 64
    pointers = gemm.x + (copy.rows * gemm.K + k)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=(lane < copy.count)[:, None] & (column >= 0)[None, :])


@gluon.jit
def copy_w(rings, slot, first, stride, there, HALVES: gl.constexpr):
    """Start copying one step of an item's strips to step `slot` of the ring; `first` is that step of the first strip,
    `stride` the words from a strip to the next."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [rings.WARPS, 1], [1, 0])
    row = gl.arange(0, rings.ROWS, gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    offsets = (row // 64) * stride + (row % 64) * 32
    mask = ((row >= 0) & there)[:, None] & (word >= 0)[None, :]
    for half in gl.static_range(HALVES):
        pointers = first + half * (rings.ROWS // 64) * stride + offsets[:, None] + word[None, :]
        async_copy.async_copy_global_to_shared(rings.w.index(slot * HALVES + half), pointers, mask=mask)
