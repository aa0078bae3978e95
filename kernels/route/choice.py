"""What both forms of the router share: logits from their parts, the choice of experts, and the lists made of its counts.

T tokens, D d_model, E experts (E_PAD the next power of two), BT tokens a block.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def sum_of_parts(ptrs, stride, live, bias_ptr, e, E: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Logits [BT, E_PAD]: parts added in order, then the bias."""
    total = tl.load(ptrs, mask=live[:, None], other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptrs + part * stride, mask=live[:, None], other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        total += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _lowest(is_it, e, E: tl.constexpr):
    """The first expert of each row of which something is true; the last one where it is of none (rows of NaN)."""
    return tl.minimum(tl.min(tl.where(is_it, e[None, :], E), 1), E - 1)


@triton.jit
def choose(
    logits,
    rows,
    live,
    e,
    active_ptr,
    ids_ptr,
    gates_ptr,
    gate_scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Store experts and gates of some tokens; returns first and second choice (twice the first for top-1), -1 where
    inactive."""
    active = live
    if HAS_ACTIVE:
        active = live & (tl.load(active_ptr + rows, mask=live, other=0) != 0)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    peak = tl.max(logits, 1)
    exp = tl.exp(logits - peak[:, None])
    total = tl.sum(exp, 1)
    probs = (exp / total[:, None]).to(dtype).to(tl.float32)
    p1 = (1.0 / total).to(dtype).to(tl.float32)  # the largest of probs: exp(0) / total
    best = _lowest(probs == p1[:, None], e, E)
    first = tl.where(active, best, -1)
    second = first
    if TOP_K == 1:
        tl.store(ids_ptr + rows, first, mask=live)
        tl.store(gates_ptr + rows, tl.where(active, p1 * gate_scale, 0.0), mask=live)
    else:
        rest = tl.where(e[None, :] == best[:, None], float("-inf"), logits)
        second_peak = tl.max(rest, 1)
        next_best = _lowest(rest == second_peak[:, None], e, E)
        p2 = (tl.exp(second_peak - peak) / total).to(dtype).to(tl.float32)
        both = tl.maximum((p1 + p2).to(dtype).to(tl.float32), EPS)
        g1 = (p1 / both).to(dtype).to(tl.float32) * gate_scale
        g2 = (p2 / both).to(dtype).to(tl.float32) * gate_scale
        second = tl.where(active, next_best, -1)
        tl.store(ids_ptr + rows * 2, first, mask=live)
        tl.store(ids_ptr + rows * 2 + 1, second, mask=live)
        tl.store(gates_ptr + rows * 2, tl.where(active, g1, 0.0), mask=live)
        tl.store(gates_ptr + rows * 2 + 1, tl.where(active, g2, 0.0), mask=live)
    return first, second


@triton.jit
def store_lists(
    counts,
    e,
    counts_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Counts, offsets and tile records of all experts, from their counts [E_PAD]."""
    tiles = (counts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = tl.cumsum(counts, 0)
    last_tiles = tl.cumsum(tiles, 0)
    offsets = ends - counts
    tl.store(counts_ptr + e, counts, mask=e < E)
    tl.store(offsets_ptr + e, offsets, mask=e < E)
    tl.store(offsets_ptr + 1 + e, ends, mask=e == E - 1)
    tl.store(num_tiles_ptr + tl.zeros((E_PAD,), tl.int32), last_tiles, mask=e == E - 1)
    records = tiles_ptr + (last_tiles - tiles) * 4
    for t in range(tl.max(tiles, 0)):
        mask = t < tiles
        tl.store(records + t * 4, e, mask=mask)
        tl.store(records + t * 4 + 1, offsets + t * BLOCK_TOKENS, mask=mask)
        tl.store(records + t * 4 + 2, tl.minimum(counts - t * BLOCK_TOKENS, BLOCK_TOKENS), mask=mask)
        tl.store(records + t * 4 + 3, tl.zeros((E_PAD,), tl.int32), mask=mask)


@triton.jit
def zero(ptr, words, first, stride):
    """Zero an int32 buffer in pieces of 256 words from word `first` on, `stride` words apart."""
    for s in range(first, words, stride):
        word = s + tl.arange(0, 256)
        tl.store(ptr + word, tl.zeros((256,), tl.int32), mask=word < words)
