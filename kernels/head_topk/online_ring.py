"""The rings of `online`: weights for all groups, rows for each, and the loads that fill them.

D features, V vocabulary; a tile is CH tokens by ROWS rows a group, a step BK features of it. Tiles, steps and stages are
counted as `online` does; row_tiles: programs whose tiles are of the same tokens.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

from kernels.head_topk.online_results import CH, ROWS


@aggregate
class Ring:
    """Two rings: X_STAGES of BK features of ROWS rows for each of GROUPS groups, and STAGES of BK features of CH tokens for
    all of them, with what says that they are full or free. A group alone reads its rows, so it needs no barrier to know them
    free.

    SLOTS (int8, else 0) of CH scales: as many as it takes that whoever asks for a tile's scales finds every group past the
    results of the tile that had their slot.
    """

    xs: gl.shared_memory_descriptor
    ws: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    x_ready: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    GROUPS: gl.constexpr
    X_STAGES: gl.constexpr
    STAGES: gl.constexpr
    STEPS: gl.constexpr
    BK: gl.constexpr
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, xs, ws, scales, x_ready, ready, free, GROUPS, X_STAGES, STAGES, STEPS, BK, SLOTS):
        self.xs = xs
        self.ws = ws
        self.scales = scales
        self.x_ready = x_ready
        self.ready = ready
        self.free = free
        self.GROUPS = gl.constexpr(GROUPS)
        self.X_STAGES = gl.constexpr(X_STAGES)
        self.STAGES = gl.constexpr(STAGES)
        self.STEPS = gl.constexpr(STEPS)
        self.BK = gl.constexpr(BK)
        self.SLOTS = gl.constexpr(SLOTS)


@gluon.jit
def load_weights(w, scales, ring, turn, tile, row_tiles, step, stage):
    """Ask for a stage of weights; the scales of a tile's tokens (int8) come with its first stage."""
    full = ring.ready.index(stage)
    BYTES: gl.constexpr = CH * ring.BK * (ring.ws.dtype.primitive_bitwidth // 8)
    if ring.SLOTS == 0:
        mbarrier.expect(full, BYTES)
    elif step == 0:
        mbarrier.expect(full, BYTES + CH * 4)
        slot = ring.scales.index(turn % ring.SLOTS)
        tma.async_copy_global_to_shared(scales, [tile // row_tiles * CH], full, slot)
    else:
        mbarrier.expect(full, BYTES)
    tma.async_copy_global_to_shared(w, [tile // row_tiles * CH, step * ring.BK], full, ring.ws.index(stage))


@gluon.jit
def load_rows(group: gl.constexpr, x, ring, first, step, stage):
    """Ask for a stage of a group's own rows."""
    at = group * ring.X_STAGES + stage
    full = ring.x_ready.index(at)
    mbarrier.expect(full, ROWS * ring.BK * (ring.xs.dtype.primitive_bitwidth // 8))
    tma.async_copy_global_to_shared(x, [first, step * ring.BK], full, ring.xs.index(at))


@gluon.jit
def refill_weights(w, scales, ring, tiles, row_tiles, turn, tile, step, stage, phase):
    """A stage gets what is due at `step`, counted from this tile's first, as soon as every group has left it."""
    tile += step // ring.STEPS * gl.num_programs(0)
    if tile < tiles:
        mbarrier.wait(ring.free.index(stage), phase)
        load_weights(w, scales, ring, turn + step // ring.STEPS, tile, row_tiles, step % ring.STEPS, stage)


@gluon.jit
def refill_rows(group: gl.constexpr, x, ring, tiles, tile, first, step, stage):
    """The same for the group's own rows, which it has just left."""
    if tile + step // ring.STEPS * gl.num_programs(0) < tiles:
        load_rows(group, x, ring, first, step % ring.STEPS, stage)
