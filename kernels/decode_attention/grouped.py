"""Attention of the entries of one sentence (at most 8) on tensor cores, for 16 bits on Hopper: one program = one group and
HP heads, a warp each. Gluon has no interpreter; `kernel.py` holds the plain twins, and what the cells are.

No shared memory and no barrier: every operand comes from global memory as its product wants it, 16 bytes a thread. The first
product is queries [16 rows, 8 of them empty] by keys; the weights of its first eight rows then lie as the second operand of
values^T [DH, positions] by weights^T [positions, 8]. All but the queries, and but the cells of this step, is read before the
kernel before is done, and the next kernel may start before that too; `launcher.py` says what that asks of callers.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.decode_attention.entries import ends_at_once, entries_of, follows_start_token
from kernels.dependency import let_next_start, wait_for_kernels_before


@gluon.constexpr_function
def _layout(shape, registers, lanes):
    """A warp a head: bases of registers and lanes over the other two axes."""
    heads = [[1 << bit, 0, 0] for bit in range(shape[0].bit_length() - 1)]
    inside = [[0, *base] for base in registers if base[0] < shape[1] and base[1] < shape[2]]
    return gl.DistributedLinearLayout(inside, [[0, *base] for base in lanes], heads, [], shape)


@gluon.constexpr_function
def values_layout(heads, positions, features):
    """[HP, positions, DH]: a thread has pairs of positions and eight neighbouring features of each."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 64], [1, 0], [8, 0], [16, 0]]
    return _layout([heads, positions, features], registers, [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]])


@gluon.constexpr_function
def scores_layout(heads, positions):
    """[HP, 8 entries, positions]: the first eight rows of a product."""
    registers, lanes = [[0, 1], [0, 8], [0, 16]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return _layout([heads, 8, positions], registers, lanes)


@gluon.constexpr_function
def out_layout(heads, features):
    """[HP, 8 entries, DH]: the transposed result, eight neighbouring features a thread."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 64], [1, 0]]
    return _layout([heads, 8, features], registers, [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]])


@gluon.jit
def _axis(size: gl.constexpr, axis: gl.constexpr, L: gl.constexpr):
    """0 ... size - 1 along one of the three axes of L, the other two of size 1."""
    A: gl.constexpr = 1 if axis == 0 else 0
    B: gl.constexpr = 1 if axis == 2 else 2
    line = gl.arange(0, size, layout=gl.SliceLayout(A, gl.SliceLayout(B, L)))
    return gl.expand_dims(gl.expand_dims(line, A), B)


@gluon.jit
def _group(slots_ptr, starts_ptr, counts_ptr):
    """(slot, first entry, number of entries: 0 for an unused group) of this program's group."""
    group = gl.program_id(1)
    slot = gl.load(slots_ptr + group)
    count = gl.load(counts_ptr + group)
    return slot, gl.load(starts_ptr + group), entries_of(slot, count, 8)


@gluon.jit
def _queries(q_ptr, q_stride, start, count, head, DH: gl.constexpr, HP: gl.constexpr, M: gl.constexpr):
    A: gl.constexpr = gl.DotOperandLayout(0, M, 8)
    entry = _axis(16, 1, A)
    at = _axis(HP, 0, A) * DH + entry * q_stride + _axis(DH, 2, A)
    return gl.load(q_ptr + start.to(gl.int64) * q_stride + head * DH + at, mask=entry < count, other=0.0)


@gluon.jit
def _scores(q, k, HP: gl.constexpr, BS: gl.constexpr, M: gl.constexpr, L: gl.constexpr):
    """q k^T of the first eight rows."""
    product = mma_v2(q, k, gl.zeros((HP, 16, BS), gl.float32, layout=M))
    rows, _ = gl.split(gl.permute(gl.reshape(product, (HP, 2, 8, BS)), (0, 2, 3, 1)))
    return gl.convert_layout(rows, L, assert_trivial=True)


@gluon.jit
def _softmax_step(score, v, peak, total, acc, DH: gl.constexpr, HP: gl.constexpr, BS: gl.constexpr, M: gl.constexpr):
    """Running softmax [HP, 8] and its sum of values [HP, DH, 8] over BS more positions; features in the order of the rows
    of tensor cores: f = 64 a + 8 b + 2 c + d is row 64 a + 16 c + 8 d + b."""
    new_peak = gl.maximum(peak, gl.max(score, 2))
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = gl.exp2(score - gl.expand_dims(base, 2))
    decay = gl.exp2(peak - base)
    total = total * decay + gl.sum(weight, 2)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, M)), 1)
    return new_peak, total, _add_values(acc, weight, v, DH, HP, BS, M)


@gluon.jit
def _softmax_start(score, v, DH: gl.constexpr, HP: gl.constexpr, BS: gl.constexpr, M: gl.constexpr):
    """The same for the first positions."""
    peak = gl.max(score, 2)
    weight = gl.exp2(score - gl.expand_dims(gl.where(peak == float("-inf"), 0.0, peak), 2))
    nothing = gl.zeros((HP, DH, 8), gl.float32, layout=M)
    return peak, gl.sum(weight, 2), _add_values(nothing, weight, v, DH, HP, BS, M)


@gluon.jit
def _add_values(acc, weight, v, DH: gl.constexpr, HP: gl.constexpr, BS: gl.constexpr, M: gl.constexpr):
    A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    v = gl.permute(gl.reshape(v, (HP, BS, DH // 64, 8, 4, 2)), (0, 2, 4, 5, 3, 1))
    v = gl.convert_layout(gl.reshape(v, (HP, DH, BS)), A, assert_trivial=True)
    weight = gl.convert_layout(gl.permute(weight.to(v.dtype), (0, 2, 1)), B, assert_trivial=True)
    return mma_v2(v, weight, acc)


@gluon.jit
def _write(out_ptr, acc, total, start, count, head, H: gl.constexpr, DH: gl.constexpr, HP: gl.constexpr, M: gl.constexpr):
    """acc / total of the group's entries to out; zeros where there was nothing to attend to."""
    L: gl.constexpr = out_layout(HP, DH)
    total = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, M))
    context = (acc / gl.expand_dims(total, 1)).to(out_ptr.dtype.element_ty)
    context = gl.permute(gl.reshape(context, (HP, DH // 64, 4, 2, 8, 8)), (0, 5, 1, 4, 2, 3))
    context = gl.convert_layout(gl.reshape(context, (HP, 8, DH)), L, assert_trivial=True)
    entry = _axis(8, 1, L)
    at = _axis(HP, 0, L) * DH + entry * (H * DH) + _axis(DH, 2, L)
    gl.store(out_ptr + start.to(gl.int64) * (H * DH) + head * DH + at, context, mask=entry < count)


@gluon.jit
def cross_group_kernel(
    q_ptr,
    cells_ptr,
    lengths_ptr,
    slots_ptr,
    starts_ptr,
    counts_ptr,
    out_ptr,
    q_stride,
    slot_stride,
    scale_log2,
    H: gl.constexpr,
    DH: gl.constexpr,
    HP: gl.constexpr,
    BS: gl.constexpr,
    AHEAD: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """As `kernel.decode_cross_attention_kernel`."""
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [HP, 1, 1], [1, 16, 8])
    K: gl.constexpr = gl.DotOperandLayout(1, M, 8)
    V: gl.constexpr = values_layout(HP, BS, DH)
    S: gl.constexpr = scores_layout(HP, BS)
    CELL: gl.constexpr = 2 * H * DH
    wait_for_kernels_before(OVERLAP and not AHEAD)
    let_next_start(OVERLAP)
    head = gl.program_id(0) * HP
    slot, start, count = _group(slots_ptr, starts_ptr, counts_ptr)
    if ends_at_once(count):
        return
    length = gl.load(lengths_ptr + slot, mask=count > 0, other=0)
    cells = cells_ptr + slot.to(gl.int64) * slot_stride + head * DH
    at_k = _axis(BS, 2, K)
    at_v = _axis(BS, 1, V)
    at = _axis(BS, 2, S)
    k_ptrs = cells + (_axis(HP, 0, K) * DH + at_k * CELL + _axis(DH, 1, K))
    v_ptrs = cells + H * DH + (_axis(HP, 0, V) * DH + at_v * CELL + _axis(DH, 2, V))
    k = gl.load(k_ptrs, mask=at_k < length, other=0.0)
    v = gl.load(v_ptrs, mask=at_v < length, other=0.0)
    wait_for_kernels_before(OVERLAP and AHEAD)
    q = _queries(q_ptr, q_stride, start, count, head, DH, HP, M)
    score = gl.where(at < length, _scores(q, k, HP, BS, M, S) * scale_log2, float("-inf"))
    peak, total, acc = _softmax_start(score, v, DH, HP, BS, M)
    for first in range(BS, length, BS):
        k = gl.load(k_ptrs + first * CELL, mask=at_k + first < length, other=0.0)
        v = gl.load(v_ptrs + first * CELL, mask=at_v + first < length, other=0.0)
        score = gl.where(at + first < length, _scores(q, k, HP, BS, M, S) * scale_log2, float("-inf"))
        peak, total, acc = _softmax_step(score, v, peak, total, acc, DH, HP, BS, M)
    _write(out_ptr, acc, total, start, count, head, H, DH, HP, M)


@gluon.jit
def _shared_positions(ancestry_ptr, rows_ptr, ancestry_stride, start, count, row, last, HP: gl.constexpr):
    """How many of the first `last` positions lie in the same cells for every entry: there their histories are one. Entries
    of a group stand at one position; `row` is the first one's."""
    L: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(0, _layout([HP, 1, 32], [], [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]))
    )
    lane = gl.arange(0, 32, layout=L)
    shared = 0
    for first in range(0, last, 32):
        if shared == first:
            t = first + lane
            held = gl.load(ancestry_ptr + row.to(gl.int64) * ancestry_stride + t, mask=t < last, other=-1)
            same = t < last
            for mates in range(1, count, 4):  # four at a time: their loads wait together
                for i in gl.static_range(4):
                    mate = gl.load(rows_ptr + start + mates + i, mask=mates + i < count, other=-1)
                    there = (t < last) & (mate >= 0)
                    theirs = gl.load(ancestry_ptr + mate.to(gl.int64) * ancestry_stride + t, mask=there, other=-1)
                    same = same & ((mate < 0) | (theirs == held))
            shared = first + gl.min(gl.where(same, 32, lane), 0)
    return shared


@gluon.jit
def _cells(s, ancestry_ptr, rows_ptr, ancestry_stride, start, count, last, shared, log_width, size, max_positions):
    """Cell number (row * T_max + position) of places s, -1 for none."""
    beyond = s - shared
    who = gl.where(beyond < 0, 0, beyond & ((1 << log_width) - 1))
    position = gl.where(beyond < 0, s, shared + (beyond >> log_width))
    there = (s < size) & (who < count)
    row = gl.load(rows_ptr + start + who, mask=there, other=-1)
    earlier = there & (position < last)
    held = gl.load(ancestry_ptr + row.to(gl.int64) * ancestry_stride + position, mask=earlier, other=0)
    held = gl.where(position == last, row, held)
    return gl.where(there, held * max_positions + position, -1)


@gluon.jit(do_not_specialize=["ancestry_stride"])
def self_group_kernel(
    q_ptr,
    cells_ptr,
    ancestry_ptr,
    rows_ptr,
    positions_ptr,
    slots_ptr,
    starts_ptr,
    counts_ptr,
    out_ptr,
    q_stride,
    row_stride,
    ancestry_stride,
    scale_log2,
    H: gl.constexpr,
    DH: gl.constexpr,
    HP: gl.constexpr,
    BS: gl.constexpr,
    AHEAD: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Every cell of the group's histories once. It lists them by places: first the positions whose cells all entries share,
    then the others by position, and at each position by entry (a power of two of places, some of them empty)."""
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [HP, 1, 1], [1, 16, 8])
    K: gl.constexpr = gl.DotOperandLayout(1, M, 8)
    V: gl.constexpr = values_layout(HP, BS, DH)
    S: gl.constexpr = scores_layout(HP, BS)
    CELL: gl.constexpr = 2 * H * DH
    wait_for_kernels_before(OVERLAP and not AHEAD)
    let_next_start(OVERLAP)
    head = gl.program_id(0) * HP
    _, start, count = _group(slots_ptr, starts_ptr, counts_ptr)
    if ends_at_once(count):
        return
    row = gl.load(rows_ptr + start, mask=count > 0, other=-1)
    last = gl.load(positions_ptr + start, mask=row >= 0, other=-1)
    log_width = (count > 1).to(gl.int32) + (count > 2).to(gl.int32) + (count > 4).to(gl.int32)
    shared = last
    if count > 1:
        shared = _shared_positions(ancestry_ptr, rows_ptr, ancestry_stride, start, count, row, last, HP)
    size = gl.where(row >= 0, shared + ((last + 1 - shared) << log_width), 0)
    newest = shared + ((last - shared) << log_width)  # places from here on hold what this step writes
    newest = gl.where(follows_start_token(last), 0, newest)  # all places are in the first step then
    max_positions = row_stride // CELL
    k_base = cells_ptr + head * DH + (_axis(HP, 0, K) * DH + _axis(DH, 1, K))
    v_base = cells_ptr + (H + head) * DH + (_axis(HP, 0, V) * DH + _axis(DH, 2, V))
    at_k = _axis(BS, 2, K)
    at_v = _axis(BS, 1, V)
    at = _axis(BS, 2, S)
    table = ancestry_ptr, rows_ptr, ancestry_stride, start, count, last, shared, log_width, size, max_positions
    cell_k = _cells(at_k, *table)
    cell_v = _cells(at_v, *table)
    k = gl.load(k_base + cell_k.to(gl.int64) * CELL, mask=(cell_k >= 0) & (at_k < newest), other=0.0)
    v = gl.load(v_base + cell_v.to(gl.int64) * CELL, mask=(cell_v >= 0) & (at_v < newest), other=0.0)
    wait_for_kernels_before(OVERLAP and AHEAD)
    q = _queries(q_ptr, q_stride, start, gl.where(row >= 0, count, 0), head, DH, HP, M)
    if newest < BS:
        k = gl.load(k_base + cell_k.to(gl.int64) * CELL, mask=(cell_k >= 0) & (at_k >= newest), other=k)
        v = gl.load(v_base + cell_v.to(gl.int64) * CELL, mask=(cell_v >= 0) & (at_v >= newest), other=v)
    own = (1 << log_width) - 1
    entry = _axis(8, 1, S)
    sees = (at < size) & ((at < shared) | (((at - shared) & own) == entry))
    score = gl.where(sees, _scores(q, k, HP, BS, M, S) * scale_log2, float("-inf"))
    peak, total, acc = _softmax_start(score, v, DH, HP, BS, M)
    for first in range(BS, size, BS):
        cell_k = _cells(at_k + first, *table)
        cell_v = _cells(at_v + first, *table)
        k = gl.load(k_base + cell_k.to(gl.int64) * CELL, mask=cell_k >= 0, other=0.0)
        v = gl.load(v_base + cell_v.to(gl.int64) * CELL, mask=cell_v >= 0, other=0.0)
        s = at + first
        sees = (s < size) & ((s < shared) | (((s - shared) & own) == entry))
        score = gl.where(sees, _scores(q, k, HP, BS, M, S) * scale_log2, float("-inf"))
        peak, total, acc = _softmax_step(score, v, peak, total, acc, DH, HP, BS, M)
    _write(out_ptr, acc, total, start, count, head, H, DH, HP, M)
