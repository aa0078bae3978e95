"""One item of a GEMM: its products, what follows them, and on the side the copies that its successor will need.

At chunk c of a step the program
  1. waits until the copies of c have arrived and every warp is done with c - 2,
  2. refills the buffer of c - 2 (X_STEPS steps ahead) and, at c = 1, that of this step's weights, by then in registers,
     W_STEPS >= X_STEPS, so that weights copied with an older chunk than c have arrived when c has,
  3. decodes 64 input features for each half of its output features and issues their dots; the wait after a dot is for the
     one before it. Tiles of up to 32 pairs whose programs have room for three steps of x leave registers to decode for both
     halves first: their dots then follow each other without a wait, and the wait after both is for the two before them.
Where three steps of x fit (X_STEPS > 2; int4, whose steps have four chunks), 1 and 2 are done once a step: two barriers and
one fence instead of four. What an item needs at its end (scales, biases, gates) is asked for at its start: memory is a
thousand cycles away, and then nothing else would hide them.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.expert_gemm.dequant import BF16_PRODUCTS
from kernels.expert_gemm.hopper.decode import decode
from kernels.expert_gemm.hopper.items import release
from kernels.expert_gemm.hopper.rings import CopyOfX, copy_w, copy_x

PRODUCTS = gl.constexpr(BF16_PRODUCTS)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def _scale_and_bias(expert, n0, gemm, ROWS: gl.constexpr, ACC: gl.constexpr):
    """Those of ROWS features of an expert from n0 on, as they lie in memory."""
    n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    return gl.load(gemm.scales + expert * gemm.N + n), gl.load(gemm.biases + expert * gemm.N + n)


@gluon.jit
def _gates_and_rows(tile, pairs, WIDTH: gl.constexpr, ACC: gl.constexpr, STORE: gl.constexpr):
    """Gates of a tile's pairs as columns of its accumulator, and their rows of out as columns of what is stored."""
    pair = gl.arange(0, WIDTH, gl.SliceLayout(0, ACC))
    lane = gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
    rows = gl.load(pairs.gather + tile.start + lane, mask=lane < tile.count, other=0)
    mine = gl.load(pairs.gather + tile.start + pair, mask=pair < tile.count, other=0)
    return gl.load(pairs.gates + mine, mask=pair < tile.count, other=0.0), rows


@gluon.jit
def _write(acc, scale, bias, gates, rows, count, n0, gemm, LAYOUT: gl.constexpr):
    """acc [ROWS, BT] -> scale, bias, then ReLU (FIRST) or gate; stored to `rows` of out [., N], features n0 on."""
    FACTOR: gl.constexpr = PRODUCTS if gemm.x.dtype.element_ty == gl.bfloat16 else 1.0  # a power of two: exact
    y = acc * (scale.to(gl.float32) * FACTOR)[:, None] + bias.to(gl.float32)[:, None]
    y = gl.maximum(y, 0.0) if gemm.FIRST else y * gates.to(gl.float32)[None, :]
    y = gl.convert_layout(y.to(gemm.out.dtype.element_ty), LAYOUT)
    lane = gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    m = n0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    gl.store(
        gemm.out + rows.to(gl.int64)[None, :] * gemm.N + m[:, None], y, mask=(lane < count)[None, :] & (m >= 0)[:, None]
    )


@gluon.jit
def _wait_for_copies(chunk: gl.constexpr, rings):
    """Until those of this chunk are there, and no warp reads what is refilled next."""
    if chunk % rings.PER_GROUP == 0:
        async_copy.wait_group(rings.GROUPS - 1)
        barrier()
        fence_async_shared()
    elif chunk == 1:
        barrier()  # every warp is done with the step before and has the weights of this one


@gluon.jit
def _x_ahead(step, item, next_item, gemm, rings):
    """What of x is copied from chunk 1 of this step on: the same item's, or at its end its successor's."""
    ahead = step + (rings.X_STEPS - 1 if rings.BY_STEP else rings.X_STEPS)
    same = ahead < gemm.STEPS
    k = gl.where(same, ahead, ahead - gemm.STEPS) * rings.KB
    rows = gl.where(same, item.rows, next_item.rows) // gemm.ROW_DIVISOR
    return CopyOfX(rows, gl.where(same, item.tile.count, next_item.tile.count), k)


@gluon.jit
def _copy_w_ahead(step, slot, item, next_strips, gemm, rings):
    """Refill a step of the weights' ring: with the same item's, or at its end with its successor's."""
    ahead = step + rings.W_STEPS
    same = ahead < gemm.STEPS
    first = gl.where(same, item.weights + ahead * 2048, next_strips.first + (ahead - gemm.STEPS) * 2048)
    stride = gl.where(same, gemm.STRIDE, next_strips.stride)
    copy_w(rings, slot, first, stride, same | next_strips.there, gemm.HALVES)


@gluon.jit
def multiply_item(item, next_item, next_strips, turn, copy, written, lanes, gemm, pairs, rings, WIDTH: gl.constexpr):
    """One item, WIDTH lanes wide; at its end its successor's operands are on their way. next_strips: of the next item, or of
    the program's first one of the second GEMM. turn: steps that the rings have made so far; copy: where copying x goes on.
    Returns these two as they are then. written: tile of the program's item of the first GEMM before this one, which is
    counted as written in the second step here, or -1: none, or counted before."""
    dtype: gl.constexpr = gemm.x.dtype.element_ty
    BITS: gl.constexpr = rings.BITS
    ROWS: gl.constexpr = rings.ROWS
    CHUNKS: gl.constexpr = rings.CHUNKS
    X_STEPS: gl.constexpr = rings.X_STEPS
    HALVES: gl.constexpr = gemm.HALVES
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[rings.WARPS, 1], instr_shape=[16, WIDTH, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    PAIRED: gl.constexpr = HALVES == 2 and WIDTH <= 32 and rings.BY_STEP  # see above
    EARLY: gl.constexpr = HALVES * WIDTH <= 128  # else the accumulators leave no registers for the gates
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, rings.WARPS], [0, 1])  # 128 neighbouring bytes a row
    tile = item.tile
    n0 = item.number % gemm.BLOCKS_N * (HALVES * ROWS)
    scale0, bias0 = _scale_and_bias(tile.expert, n0, gemm, ROWS, ACC)
    if HALVES == 2:
        scale1, bias1 = _scale_and_bias(tile.expert, n0 + ROWS, gemm, ROWS, ACC)
    store_lane = gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
    if gemm.FIRST:
        gates = scale0  # none
        out_rows = tile.start + store_lane
    elif EARLY:
        gates, out_rows = _gates_and_rows(tile, pairs, WIDTH, ACC, STORE)
    acc0 = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, ACC))
    acc1 = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, ACC))
    gl.static_assert(gemm.STEPS > 1, "a release belongs to the second step")
    for step in range(gemm.STEPS):
        w_slot = turn % rings.W_STEPS
        x_slot = turn % X_STEPS
        x_before = (turn + X_STEPS - 1) % X_STEPS
        turn += 1
        for c in gl.static_range(CHUNKS):
            _wait_for_copies(c, rings)
            # behind a barrier, and a step after its stores: a release waits until they are there
            if gemm.FIRST and rings.SPARE and c == 1:  # noqa: SIM102 (decided while compiling)
                if (step == 1) & (written >= 0):
                    release(written, pairs)
            if not rings.BY_STEP:  # into the buffer of chunk c - 2
                copy_x(rings, x_before if c < 2 else x_slot, (c + CHUNKS - 2) % CHUNKS, copy, lanes, gemm)
            if c == 0:
                words0 = rings.w.index(w_slot * HALVES).load(A)
                if HALVES == 2:
                    words1 = rings.w.index(w_slot * HALVES + 1).load(A)
            if c == 1:
                copy = _x_ahead(step, item, next_item, gemm, rings)
                if rings.BY_STEP:
                    for more in gl.static_range(CHUNKS):
                        copy_x(rings, x_before, more, copy, lanes, gemm)
                _copy_w_ahead(step, w_slot, item, next_strips, gemm, rings)
            if c == 1 or not rings.BY_STEP:
                async_copy.commit_group()
            x = rings.x[c].index(x_slot).slice(0, WIDTH).permute((1, 0))
            if PAIRED:
                a0 = decode(words0, c, BITS, ROWS, dtype, A)
                a1 = decode(words1, c, BITS, ROWS, dtype, A)
                acc0 = warpgroup_mma(a0, x, acc0, is_async=True)
                acc1 = warpgroup_mma(a1, x, acc1, is_async=True)
                acc0 = warpgroup_mma_init(warpgroup_mma_wait(2, deps=[acc0]))
            else:
                acc0 = warpgroup_mma(decode(words0, c, BITS, ROWS, dtype, A), x, acc0, is_async=True)
                if HALVES == 2:
                    acc1 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc1]))
                    acc1 = warpgroup_mma(decode(words1, c, BITS, ROWS, dtype, A), x, acc1, is_async=True)
                acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
    if not (gemm.FIRST or EARLY):
        gates, out_rows = _gates_and_rows(tile, pairs, WIDTH, ACC, STORE)
    done = warpgroup_mma_wait(HALVES - 1, deps=[acc0])
    _write(done, scale0, bias0, gates, out_rows, tile.count, n0, gemm, STORE)
    if HALVES == 2:
        done = warpgroup_mma_wait(0, deps=[acc1])
        _write(done, scale1, bias1, gates, out_rows, tile.count, n0 + ROWS, gemm, STORE)
    return turn, copy
