"""One program = BM consecutive tokens of the pack and one head.

S packed tokens, H heads, DH head_dim; a token's qkv is [3, H, DH]. Scores are kept in powers of two (`scale_log2` =
log2(e) / sqrt(DH)).
"""

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs


@triton.jit(do_not_specialize=["S"])
def encoder_attention_kernel(
    qkv_ptr,
    starts_ptr,
    ends_ptr,
    out_ptr,
    S,
    qkv_stride,
    scale_log2,
    H: tl.constexpr,
    DH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Goes through the sentences of its tokens one by one, in key blocks counted from the sentence's start. A token of
    another sentence sees a block of -inf, which leaves its sums as they are: its bits depend neither on where its sentence
    lies in the pack nor on the sentences beside it."""
    wait_for_inputs(OVERLAP)
    head = tl.program_id(0)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    d = head * DH + tl.arange(0, DH)
    start = tl.load(starts_ptr + token, mask=token < S, other=0)
    end = tl.load(ends_ptr + token, mask=token < S, other=0)
    live = start < end
    opens = live & ((token == start) | (token % BM == 0))  # this program's first token of each sentence
    q_ptrs = qkv_ptr + token.to(tl.int64)[:, None] * qkv_stride + d[None, :]
    q = tl.load(q_ptrs, mask=live[:, None], other=0.0)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DH), tl.float32)
    sentence, stop, at = -1, 0, 0
    for _ in tl.range(0, tl.sum(tl.where(opens, tl.cdiv(end - start, BN), 0), 0), num_stages=STAGES):
        if at >= stop:
            sentence = tl.min(tl.where(opens & (start > sentence), start, S), 0)
            stop = tl.max(tl.where(live & (start == sentence), end, 0), 0)
            at = sentence
        key = at + tl.arange(0, BN)
        there = key < stop
        k_ptrs = qkv_ptr + key.to(tl.int64)[:, None] * qkv_stride + (H * DH + d)[None, :]
        k = tl.load(k_ptrs, mask=there[:, None], other=0.0)
        v = tl.load(k_ptrs + H * DH, mask=there[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        mine = (live & (start == sentence))[:, None]
        score = tl.where(mine & there[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 1)
        new_acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        acc = tl.where(mine, new_acc, acc)  # 0 x v is not 0 where the other sentence's v overflowed
        peak = new_peak
        at += BN
    context = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_ptrs = out_ptr + token.to(tl.int64)[:, None] * (H * DH) + d[None, :]
    tl.store(out_ptrs, context.to(out_ptr.dtype.element_ty), mask=(token < S)[:, None])
