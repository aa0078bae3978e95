"""The second launch: one program a row makes log-sum-exp and the k best tokens of what the first one left.

R rows, V vocabulary, BV logits a chunk, C = ceil(V / BV) chunks; `kernel` and `online` say what is handed over.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.head_topk.kernel import ordered


@triton.jit
def _take_best(order, ids):
    """The largest entry of int32 `order` (of equals the one with the lowest id), its id, and `order` without it.

    A 32-bit reduction is one instruction a warp from compute capability 8.0 on; a bitonic sort compiled for half a minute.
    """
    best = tl.max(order)
    chosen = tl.min(tl.where(order == best, ids, 0x7FFFFFFF))
    return best, chosen, tl.where(ids == chosen, -(2**31), order)


@triton.jit(do_not_specialize=["R", "R_pad", "P"])
def head_merge_kernel(
    partial_ptr,
    sums_ptr,
    banned_ptr,
    banned_logit_ptr,
    logits_ptr,
    row_scale_ptr,
    values_ptr,
    ids_ptr,
    lse_ptr,
    R,
    R_pad,
    P,
    V,
    BV: tl.constexpr,
    C_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    PACK: tl.constexpr,
    LANED: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = one row: log-sum-exp over all chunks; the K best logits lie in the K chunks that are best by
    (maximum, lower index), and only those are read. LANED: the order in which `specialized` writes the logits of a chunk.
    P_PAD > 0: maxima and sums lie apart, as `online` tells them, of all tokens, banned or not; sums by its P programs, and
    the chunk of a banned token is there in any case. SCALED: logits lack the factor of their row."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    C = tl.cdiv(V, BV)
    c = tl.arange(0, C_PAD)
    row_scale = tl.load(row_scale_ptr + row) if SCALED else 1.0
    if P_PAD > 0:
        tops = tl.load(partial_ptr + (c // PACK * R_pad + row) * PACK + c % PACK, mask=c < C, other=float("-inf"))
        p = tl.arange(0, P_PAD)
        at = (p * R_pad + row) * 2
        peaks = tl.load(sums_ptr + at, mask=p < P, other=float("-inf"))
        sums = tl.load(sums_ptr + at + 1, mask=p < P, other=0.0)
    else:
        at = (c // PACK * R + row) * (2 * PACK) + c % PACK * 2
        tops = tl.load(partial_ptr + at, mask=c < C, other=float("-inf"))
        sums = tl.load(partial_ptr + at + 1, mask=c < C, other=0.0)
        peaks = tops
    peak = tl.max(peaks, 0)
    banned = -1
    if HAS_BANNED:
        banned = tl.load(banned_ptr + row)
        has = (banned >= 0) & (banned < V)
        if P_PAD == 0:
            extra = tl.load(banned_logit_ptr + row, mask=has, other=float("-inf"))
            peak = tl.maximum(peak, extra)
        else:  # the maximum of its chunk counted it, and its chunk is stored
            first = tl.where(has, banned // BV * BV, 0)
            tokens = first + tl.arange(0, BV)
            held = first.to(tl.int64) * R + row * tl.minimum(V - first, BV) + tl.arange(0, BV)
            others = tl.load(logits_ptr + held, mask=has & (tokens < V) & (tokens != banned), other=float("-inf"))
            if SCALED:
                others *= row_scale
            tops = tl.where(has & (c == first // BV), tl.max(others, 0), tops)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(sums * tl.exp(peaks - peak), 0)
    if HAS_BANNED and P_PAD == 0:
        total += tl.exp(extra - peak)
    lse = peak + tl.log(total)
    broken = ~((lse > float("-inf")) & (lse < float("inf")))

    slot = tl.arange(0, K_PAD)
    chunks = tl.zeros((K_PAD,), tl.int32) + C
    order = tl.where(c < C, ordered(tops), -(2**31))
    for i in range(K):  # with fewer than K chunks the rest repeat chunk 0: a token is taken by its id, so only once
        _, chunk, order = _take_best(order, c)
        chunks = tl.where(slot == i, chunk, chunks)
    place = tl.arange(0, BV)[None, :]
    start = (chunks * BV)[:, None]
    ids = start + place
    valid = (slot < K)[:, None] & (ids < V)
    at = start.to(tl.int64) * R + row * tl.minimum(V - start, BV) + place
    logits = tl.load(logits_ptr + at, mask=valid, other=float("-inf"))
    if SCALED:
        logits *= row_scale
    if LANED:  # a lane of `specialized` writes its pairs of two neighbouring groups of 8 tokens in one piece
        behind = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
        ids = tl.where(start + BV <= V, start + behind, ids)
    order = tl.where(valid & (ids != banned), ordered(logits), -(2**31))
    nan = float("nan")
    for i in range(K):
        best, token, order = _take_best(order, ids)
        value = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - lse
        # a broken row names token 0: the next step of a captured graph may look it up before anyone has seen the NaN
        tl.store(values_ptr + row * K + i, tl.where(broken, nan, value))
        tl.store(ids_ptr + row * K + i, tl.where(broken, 0, token))
    tl.store(lse_ptr + row, tl.where(broken, nan, lse))
