"""Attention of the entries of one sentence (at most 8) on tensor cores, for 16 bits on Hopper: one program = HP heads,
a warp each, of one group after another (as a rule of one: see `_turns`). Gluon has no interpreter; `kernel.py` holds the
plain twins, and what the cells are.

No shared memory and no barrier: every operand comes from global memory as its product wants it, 16 bytes a thread. The first
product is queries [16 rows, 8 of them empty] by keys; the weights of its first eight rows then lie as the second operand of
values^T [DH, positions] by weights^T [positions, 8]. All but the queries, and but the cells of this step, is read before the
kernel before is done, and the next kernel may start before that too; `launcher.py` says what that asks of callers.
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.decode_attention.group_layouts import lanes_layout, out_layout, scores_layout, values_layout
from kernels.dependency import let_next_start, prefetch_lines, wait_for_kernels_before
from kernels.entries import ends_at_once, entries_of
from kernels.history_lists import BLOCKS_AHEAD, GROUP_FIELDS, SEEN_BY

CELLS = gl.constexpr((1 << SEEN_BY) - 1)  # bits of a word that number a cell
SEEN, FIELDS, BLOCKS = gl.constexpr(SEEN_BY), gl.constexpr(GROUP_FIELDS), gl.constexpr(BLOCKS_AHEAD)


@gluon.jit
def _axis(size: gl.constexpr, axis: gl.constexpr, L: gl.constexpr):
    """0 ... size - 1 along one of the three axes of L, the other two of size 1."""
    A: gl.constexpr = 1 if axis == 0 else 0
    B: gl.constexpr = 1 if axis == 2 else 2
    line = gl.arange(0, size, layout=gl.SliceLayout(A, gl.SliceLayout(B, L)))
    return gl.expand_dims(gl.expand_dims(line, A), B)


@gluon.jit
def _group(group, slots_ptr, starts_ptr, counts_ptr):
    """(slot, first entry, number of entries: 0 for an unused group)."""
    slot = gl.load(slots_ptr + group)
    count = gl.load(counts_ptr + group)
    return slot, gl.load(starts_ptr + group), entries_of(slot, count, 8)


@gluon.jit
def _turns(slots_ptr, counts_ptr, G, TURNS: gl.constexpr, HP: gl.constexpr):
    """How many groups this program takes: each one that lies a whole number of rows of the grid behind its first, up to the
    last in use. A program for every group there may be would cost more than it does: even one with nothing to do needs room
    beside the kernel before, and the kernel behind waits until it has started."""
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, lanes_layout(HP)))
    turn = gl.arange(0, 32, layout=L)
    group = gl.program_id(1) + turn * gl.num_programs(1)
    there = (turn < TURNS) & (group < G)
    count = gl.load(counts_ptr + group, mask=there, other=0)
    slot = gl.load(slots_ptr + group, mask=there, other=-1)
    return gl.max(gl.where((count > 0) & (slot >= 0), turn + 1, 0), 0)


@gluon.jit
def _queries(q_ptr, q_stride, start, count, head, DH: gl.constexpr, HP: gl.constexpr, M: gl.constexpr):
    A: gl.constexpr = gl.DotOperandLayout(0, M, 8)
    entry = _axis(16, 1, A)
    at = _axis(HP, 0, A) * DH + entry * q_stride + _axis(DH, 2, A)
    return gl.load(q_ptr + start.to(gl.int64) * q_stride + head * DH + at, mask=(entry < count) & (entry < 8), other=0.0)


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


@gluon.jit(do_not_specialize=["G"])
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
    G,
    TURNS: gl.constexpr,
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
    turns = _turns(slots_ptr, counts_ptr, G, TURNS, HP)
    if ends_at_once(turns):
        return
    for turn in range(gl.maximum(turns, 1)):
        group = gl.program_id(1) + turn * gl.num_programs(1)
        slot, start, count = _group(group, slots_ptr, starts_ptr, counts_ptr)
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
def _seen(words, own, S: gl.constexpr):
    """Words in the layout of values -> which of their cells each entry attends to, in the layout of scores."""
    return (gl.convert_layout(gl.permute(words, (0, 2, 1)), S, assert_trivial=True) & own) != 0


@gluon.jit
def _ask_ahead(list_ptr, cells_ptr, known, head, H: gl.constexpr, DH: gl.constexpr, HP: gl.constexpr, BS: gl.constexpr):
    """Ask in L2 for cells of the places behind the first BS that may be read by now: keys by half a warp, values by half."""
    L: gl.constexpr = lanes_layout(HP)
    lane = _axis(32, 2, L)
    own = (lane >> 4) * (H * DH) + (head + _axis(HP, 0, L)) * DH
    oldest = gl.load(list_ptr)
    for i in gl.static_range(BLOCKS):
        place = BS + 16 * i + (lane & 15)
        cell = gl.where(place < known, gl.load(list_ptr + place), oldest) & CELLS
        line = cells_ptr + (cell.to(gl.int64) * (2 * H * DH) + own)
        for part in gl.static_range(DH // 64):
            prefetch_lines(line + 64 * part, True)


@gluon.jit
def self_list_kernel(
    q_ptr,
    cells_ptr,
    groups_ptr,
    words_ptr,
    in_use_ptr,
    out_ptr,
    q_stride,
    width,
    scale_log2,
    H: gl.constexpr,
    DH: gl.constexpr,
    HP: gl.constexpr,
    BS: gl.constexpr,
    AHEAD: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Every cell of the group's histories once, as `kernels.history_lists` has them. Keys of the next places are asked for
    as soon as these are multiplied, values as soon as theirs are: no more registers than one block of places needs, so that
    many programs fit beside one of the map before."""
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [HP, 1, 1], [1, 16, 8])
    K: gl.constexpr = gl.DotOperandLayout(1, M, 8)
    V: gl.constexpr = values_layout(HP, BS, DH)
    S: gl.constexpr = scores_layout(HP, BS)
    CELL: gl.constexpr = 2 * H * DH
    wait_for_kernels_before(OVERLAP and not AHEAD)
    let_next_start(OVERLAP)
    turns = (gl.load(in_use_ptr) - gl.program_id(1) + gl.num_programs(1) - 1) // gl.num_programs(1)
    if ends_at_once(turns):
        return
    head = gl.program_id(0) * HP
    at_k = _axis(BS, 2, K)
    at_v = _axis(BS, 1, V)
    k_base = cells_ptr + head * DH + (_axis(HP, 0, K) * DH + _axis(DH, 1, K))
    v_base = cells_ptr + (H + head) * DH + (_axis(HP, 0, V) * DH + _axis(DH, 2, V))
    for turn in range(gl.maximum(turns, 1)):
        group = gl.program_id(1) + turn * gl.num_programs(1)
        list_ptr = words_ptr + group * width
        list_k = list_ptr + at_k
        list_v = list_ptr + at_v
        count = gl.load(groups_ptr + group * FIELDS + 1)
        word_k = gl.load(list_k)  # a list is long enough for what is asked for before its size is known
        word_v = gl.load(list_v)
        next_k = gl.load(list_k + BS)
        next_v = gl.load(list_v + BS)
        start = gl.load(groups_ptr + group * FIELDS)
        size = gl.load(groups_ptr + group * FIELDS + 2)
        known = gl.load(groups_ptr + group * FIELDS + 3)
        k = gl.load(k_base + (word_k & CELLS).to(gl.int64) * CELL, mask=at_k < known, other=0.0)
        v = gl.load(v_base + (word_v & CELLS).to(gl.int64) * CELL, mask=at_v < known, other=0.0)
        _ask_ahead(list_ptr, cells_ptr, known, head, H, DH, HP, BS)
        wait_for_kernels_before(OVERLAP and AHEAD)
        q = _queries(q_ptr, q_stride, start, gl.where(size > 0, count, 0), head, DH, HP, M)
        if known < BS:
            k = gl.load(k_base + (word_k & CELLS).to(gl.int64) * CELL, mask=(at_k >= known) & (at_k < size), other=k)
            v = gl.load(v_base + (word_v & CELLS).to(gl.int64) * CELL, mask=(at_v >= known) & (at_v < size), other=v)
        own = gl.full([1, 8, 1], 1 << SEEN, gl.int32, S) << _axis(8, 1, S)
        peak = gl.full([HP, 8], float("-inf"), gl.float32, gl.SliceLayout(2, S))
        total = gl.zeros([HP, 8], gl.float32, gl.SliceLayout(2, S))
        acc = gl.zeros((HP, DH, 8), gl.float32, layout=M)
        for first in range(0, size, BS):
            score = gl.where(_seen(word_v, own, S), _scores(q, k, HP, BS, M, S), float("-inf"))
            more = first + BS < size
            k = gl.load(k_base + (next_k & CELLS).to(gl.int64) * CELL, mask=(at_k >= 0) & more, other=0.0)
            new_peak = gl.maximum(peak, gl.max(score, 2))
            base = gl.where(new_peak == float("-inf"), 0.0, new_peak) * scale_log2
            weight = gl.exp2(score * scale_log2 - gl.expand_dims(base, 2))
            decay = gl.exp2(peak * scale_log2 - base)
            total = total * decay + gl.sum(weight, 2)
            acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, M)), 1)
            acc = _add_values(acc, weight, v, DH, HP, BS, M)
            peak = new_peak
            v = gl.load(v_base + (next_v & CELLS).to(gl.int64) * CELL, mask=(at_v >= 0) & more, other=0.0)
            word_v = next_v
            next_k = gl.load(list_k + first + 2 * BS, mask=(at_k >= 0) & (first + 2 * BS < size), other=0)
            next_v = gl.load(list_v + first + 2 * BS, mask=(at_v >= 0) & (first + 2 * BS < size), other=0)
        _write(out_ptr, acc, total, start, count, head, H, DH, HP, M)
