"""Both GEMMs of the expert FFN for many tokens: one persistent launch, decoding overlapped with the tensor cores.

T tokens, P = T * TOP_K pairs, D d_model, F d_ff. A tile is BN output features x BT pairs of one expert, as in ../kernel.py,
and packed weights are the same (../packing.py). What differs is the schedule, which Triton's own compiler does not give to a
dot with a register operand (it waits after each one): here one dot is always in flight while the next operand is decoded.

K is cut into *steps* of KB = 1024 / BITS input features (one 8 KB block of each strip) and steps into *chunks* of 64.
Weights and activations wait in rings of shared memory (`rings`); `tile` says what is done at each chunk. The rings run on
from one tile into the next, so a tile starts with its operands in place; those of weights from the first GEMM into the
second, too, where both take as many features a tile.
`schedule` deals the items (`items`). Those of the second GEMM wait for their tile's counter. All programs must be resident
(cooperative launch); a program begins the second GEMM after its own items of the first, so that nobody waits for anybody who
waits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels.dependency import wait_for_inputs
from kernels.expert_gemm.hopper.items import Gemm, Item, Pairs, release, rows_of, tile_of, wait_ready, weights_of
from kernels.expert_gemm.hopper.rings import CopyOfX, Rings, Strips, copy_w, copy_x, x_lanes
from kernels.expert_gemm.hopper.schedule import items_of
from kernels.expert_gemm.hopper.tile import barrier, multiply_item


@gluon.jit
def _strips_of_second(then, second, pairs):
    """Weights of this program's first item of the second GEMM, `then`."""
    there = then < second.end
    expert = gl.load(pairs.tiles + then // second.BLOCKS_N * 4, mask=there, other=0)
    return Strips(weights_of(then, expert, second), gl.to_tensor(second.STRIDE), there)


@gluon.jit
def _strips_of_next(next_item, then, gemm, CHAINED: gl.constexpr):
    """Weights of the next item, or, CHAINED, `then` where the first GEMM has none."""
    weights = next_item.weights
    stride = gl.to_tensor(gemm.STRIDE)
    there = next_item.number < gemm.end
    if gemm.FIRST and CHAINED:
        to_second = (next_item.number >= gemm.end) & then.there
        weights = gl.where(to_second, then.first, weights)
        stride = gl.where(to_second, then.stride, gemm.STRIDE)
        there = there | to_second
    return Strips(weights, stride, there)


@gluon.jit
def _fill(item, turn, lanes, gemm, rings, WEIGHTS: gl.constexpr):
    """Start the copies of an item whose operands nobody has asked for: x, and with WEIGHTS those too. Returns where copying
    x goes on."""
    copy = CopyOfX(item.rows // gemm.ROW_DIVISOR, item.tile.count, gl.to_tensor(0))
    for group in gl.static_range(rings.GROUPS):
        if WEIGHTS:
            there = item.number < gemm.end
            if group < rings.W_STEPS:
                slot = (turn + group) % rings.W_STEPS
                copy_w(rings, slot, item.weights + group * 2048, gemm.STRIDE, there, gemm.HALVES)
            if group == rings.GROUPS - 1:
                for more in gl.static_range(rings.GROUPS, rings.W_STEPS):
                    slot = (turn + more) % rings.W_STEPS
                    copy_w(rings, slot, item.weights + more * 2048, gemm.STRIDE, there, gemm.HALVES)
        for c in gl.static_range(group * rings.PER_GROUP, (group + 1) * rings.PER_GROUP):
            copy_x(rings, (turn + c // rings.CHUNKS) % rings.X_STEPS, c, copy, lanes, gemm)
        async_copy.commit_group()
    return CopyOfX(copy.rows, copy.count, gl.to_tensor((rings.X_STEPS - 1) * rings.KB))


@gluon.jit
def _gemm(turn, gemm, second, pairs, rings, TARGET: gl.constexpr, NARROW: gl.constexpr, CHAINED: gl.constexpr):
    """This program's items of one GEMM; returns the steps the rings have made so far.

    CHAINED: after its last item of the first GEMM a program asks for the weights of its first one of the second.
    """
    lanes = x_lanes(rings)  # once, at the start: every copy of x needs them
    number = gemm.number
    tile = tile_of(number, gemm, pairs)
    next_tile = tile_of(number + gemm.hop, gemm, pairs)
    weights = weights_of(number, tile.expert, gemm)
    then = 0
    if gemm.FIRST and CHAINED:
        then = _strips_of_second(second.number, second, pairs)
    if not gemm.FIRST:
        wait_ready(number, gemm, pairs, TARGET)
        async_copy.wait_group(0)
        barrier()  # the rings of x are free
        if CHAINED and (turn == 0) & (number < gemm.end):  # no item of the first GEMM: nobody has asked for the weights
            for q in gl.static_range(rings.W_STEPS):
                copy_w(rings, q, weights + q * 2048, gemm.STRIDE, True, gemm.HALVES)
    rows = rows_of(tile, lanes[0], gemm, pairs)
    copy = _fill(Item(number, tile, rows, weights), turn, lanes, gemm, rings, gemm.FIRST or not CHAINED)
    written = gl.to_tensor(-1)
    while number < gemm.end:
        following = number + gemm.hop
        if not gemm.FIRST:
            wait_ready(following, gemm, pairs, TARGET)
        next_rows = rows_of(next_tile, lanes[0], gemm, pairs)
        third_tile = tile_of(following + gemm.hop, gemm, pairs)  # read an item ahead
        item = Item(number, tile, rows, weights)
        next_item = Item(following, next_tile, next_rows, weights_of(following, next_tile.expert, gemm))
        strips = _strips_of_next(next_item, then, gemm, CHAINED)
        if NARROW > 0 and tile.count <= NARROW:
            turn, copy = multiply_item(item, next_item, strips, turn, copy, written, lanes, gemm, pairs, rings, NARROW)
        else:
            turn, copy = multiply_item(item, next_item, strips, turn, copy, written, lanes, gemm, pairs, rings, rings.BT)
        if gemm.FIRST and rings.SPARE:
            written = number // gemm.BLOCKS_N
        elif gemm.FIRST:
            barrier()  # every thread's stores come before the release
            release(number // gemm.BLOCKS_N, pairs)
        number = following
        tile = next_tile
        next_tile = third_tile
        weights = next_item.weights
        rows = next_rows
    if gemm.FIRST and rings.SPARE:
        barrier()
        if written >= 0:
            release(written, pairs)
    if not gemm.FIRST:
        async_copy.wait_group(0)
        barrier()
    return turn


@gluon.jit
def expert_ffn_pipelined_kernel(
    x_ptr,
    w1_ptr,
    s1_ptr,
    b1_ptr,
    w2_ptr,
    s2_ptr,
    b2_ptr,
    gate_ptr,
    gather_ptr,
    tiles_ptr,
    num_tiles_ptr,
    hidden_ptr,
    out_ptr,
    sync_ptr,
    D: gl.constexpr,
    F: gl.constexpr,
    TOP_K: gl.constexpr,
    BITS: gl.constexpr,
    BN1: gl.constexpr,
    BN2: gl.constexpr,
    BT: gl.constexpr,
    W_STEPS: gl.constexpr,
    X_STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    NARROW: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """relu(x W1^T + b1) W2^T + b2 times the gate: hidden [P, F] in expert order, out [P, D] in pair order.

    Items: (tile, n block) of the first GEMM, then of the second. sync as in `expert_ffn_kernel`: zeroed by the router, tile
    counters from word 4 on. BN1, BN2: 16 or 32 features a warp. A tile of at most NARROW pairs multiplies NARROW lanes, any
    other BT (NARROW 0: all tiles).
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    ROWS: gl.constexpr = 16 * WARPS
    HALVES: gl.constexpr = max(BN1, BN2) // ROWS
    # half a warp reads 32 bytes of each of four neighbouring rows at a time: four phases of 32 bytes keep them out of each
    # other's banks
    w_ring = gl.allocate_shared_memory(gl.int32, [W_STEPS * HALVES, ROWS, 32], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x0 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
    x1 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
    if BITS == 4:
        x2 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
        x3 = gl.allocate_shared_memory(dtype, [X_STEPS, BT, 64], LAYOUT)
        x_rings = (x0, x1, x2, x3)
    else:
        x_rings = (x0, x1)
    rings = Rings(w_ring, x_rings, BITS, W_STEPS, X_STEPS, WARPS, BT, HALVES)
    wait_for_inputs(OVERLAP)
    num_tiles = gl.load(num_tiles_ptr)
    FIRST_COST: gl.constexpr = D * BN1 // (ROWS * rings.KB)
    SECOND_COST: gl.constexpr = F * BN2 // (ROWS * rings.KB)
    program, programs = gl.program_id(0), gl.num_programs(0)
    num_first, num_second = num_tiles * (F // BN1), num_tiles * (D // BN2)
    mine1, mine2, hop = items_of(program, programs, num_first, num_second, FIRST_COST, SECOND_COST, rings.SPARE)
    pairs = Pairs(gate_ptr, gather_ptr, tiles_ptr, sync_ptr + 4)
    first = Gemm(x_ptr, w1_ptr, s1_ptr, b1_ptr, hidden_ptr, mine1, hop, F, D, BN1, True, TOP_K, ROWS, rings.KB)
    second = Gemm(hidden_ptr, w2_ptr, s2_ptr, b2_ptr, out_ptr, mine2, hop, D, F, BN2, False, TOP_K, ROWS, rings.KB)
    turn = _gemm(gl.to_tensor(0), first, second, pairs, rings, F // BN1, NARROW, BN1 == BN2)
    _gemm(turn, second, second, pairs, rings, F // BN1, NARROW, BN1 == BN2)
