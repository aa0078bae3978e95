"""Grouped GEMM over experts: one launch for each of both GEMMs, one program for each tile. Runs on any GPU.

T tokens, P = T * TOP_K pairs, E experts, N output features, K input features.
A tile is BN output features x BT pairs of one expert (products.py). A tile record is int32[4]: expert, first position in
expert order, pairs in the tile, 0.
"""

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.expert_gemm.epilogue import ends, finish
from kernels.expert_gemm.products import accumulate


@triton.jit
def _tile(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    out_ptr,
    expert,
    start,
    count,
    n_block,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    FIRST: tl.constexpr,
    BT: tl.constexpr,
):
    """BN output features of `count` pairs from `start` on in expert order, BT lanes wide."""
    lane = tl.arange(0, BT)
    valid = lane < count
    pairs = tl.load(gather_ptr + start + lane, mask=valid, other=0)
    x_rows = (pairs // TOP_K if FIRST else start + lane).to(tl.int64)
    KB: tl.constexpr = 64 * JOIN if BITS == 16 else 1024 // BITS
    steps: tl.constexpr = (K + KB - 1) // KB
    # cold memory: asked for now, nothing stands still for it at the end; gates wait for `pairs` here, before the second step
    # of weights is asked for
    scale, bias, gates = ends(s_ptr, b_ptr, gate_ptr, pairs, valid, expert, n_block, N, BITS, GROUP, BN, FIRST)
    acc = accumulate(
        x_ptr, x_rows, valid, w_ptr, s_ptr, expert, n_block, 0, steps, N, K, BITS, GROUP, BN, BT, JOIN, STAGES, ASM
    )
    out = finish(acc, scale, bias, gates, BITS, GROUP, FIRST)
    rows = (start + lane if FIRST else pairs).to(tl.int64)
    n = n_block * BN + tl.arange(0, BN)
    tl.store(
        out_ptr + rows[None, :] * N + n[:, None],
        out.to(out_ptr.dtype.element_ty),
        mask=valid[None, :] & (n < N)[:, None],
    )


@triton.jit
def expert_gemm_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    gate_ptr,
    gather_ptr,
    tiles_ptr,
    num_tiles_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    JOIN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    FIRST: tl.constexpr,
    NARROW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program = one tile. FIRST: x rows are tokens (gathered), ReLU, out rows in expert order. Else: x rows in expert
    order, gate weight applied, out rows scattered to pair order. A tile of at most NARROW pairs multiplies NARROW lanes, any
    other BT (NARROW 0: all tiles)."""
    wait_for_inputs(OVERLAP)
    n_block = tl.program_id(0)
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + tile * 4)  # past num_tiles: whatever lies there, not used
    start = tl.load(tiles_ptr + tile * 4 + 1)
    count = tl.load(tiles_ptr + tile * 4 + 2)
    if tile < tl.load(num_tiles_ptr):
        of_tile = (x_ptr, w_ptr, s_ptr, b_ptr, gate_ptr, gather_ptr, out_ptr, expert, start, count, n_block)
        if NARROW > 0 and count <= NARROW:
            _tile(*of_tile, N, K, TOP_K, BITS, GROUP, BN, JOIN, STAGES, ASM, FIRST, NARROW)
        else:
            _tile(*of_tile, N, K, TOP_K, BITS, GROUP, BN, JOIN, STAGES, ASM, FIRST, BT)
