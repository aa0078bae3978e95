"""What follows the products of a tile acc [BN, BT]: per-channel scale, bias, then ReLU or gate, in this order and in fp32.

E experts, N output features. Scales (none for 16 bits and group scales) and biases [E, N], gates [P] in pair order.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def ends(
    s_ptr,
    b_ptr,
    gate_ptr,
    pairs,
    valid,
    expert,
    n_block,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    FIRST: tl.constexpr,
):
    """What `finish` needs, as it lies in memory: scales [BN], biases [BN] and, not FIRST, gates [BT] of `pairs`. Where there
    is no scale or gate the biases stand in its place, and nobody uses them."""
    n = n_block * BN + tl.arange(0, BN)
    bias = tl.load(b_ptr + expert * N + n, mask=n < N, other=0.0)
    scale = bias
    gates = bias
    if BITS < 16 and GROUP == 0:
        scale = tl.load(s_ptr + expert * N + n, mask=n < N, other=0.0)
    if not FIRST:
        gates = tl.load(gate_ptr + pairs, mask=valid, other=0.0)
    return scale, bias, gates


@triton.jit
def finish(acc, scale, bias, gates, BITS: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr):
    """acc [BN, BT] -> scale, bias, then ReLU (FIRST) or gate: fp32 [BN, BT]."""
    out = acc
    if BITS < 16 and GROUP == 0:
        out = out * scale.to(tl.float32)[:, None]
    out += bias.to(tl.float32)[:, None]
    return tl.maximum(out, 0.0) if FIRST else out * gates.to(tl.float32)[None, :]


@triton.jit
def epilogue(
    acc,
    s_ptr,
    b_ptr,
    gate_ptr,
    pairs,
    valid,
    expert,
    n_block,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    FIRST: tl.constexpr,
):
    """`ends` and `finish` by turns, for the fused launch: it has no registers to keep the ends in while it multiplies."""
    n = n_block * BN + tl.arange(0, BN)
    out = acc
    if BITS < 16 and GROUP == 0:
        out = out * tl.load(s_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out += tl.load(b_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if FIRST:
        out = tl.maximum(out, 0.0)
    else:
        out *= tl.load(gate_ptr + pairs, mask=valid, other=0.0).to(tl.float32)[None, :]
    return out
