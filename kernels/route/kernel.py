"""The first launch of the router: gate GEMM with softmax and top-k. `order` is the second; `few` does both for few tokens.

T tokens, D d_model, E experts (E_PAD the next power of two).
"""

import triton
import triton.language as tl

from kernels.dependency import prefetch_lines, wait_for_inputs
from kernels.route.choice import choose, sum_of_parts


@triton.jit
def _thirds(w, dtype: tl.constexpr, THIRDS: tl.constexpr):
    """THIRDS: fp32 as the sum of three bf16, exactly; else w alone."""
    w = w.to(tl.float32)
    if THIRDS:
        high = w.to(dtype)
        rest = w - high.to(tl.float32)
        middle = rest.to(dtype)
        low = (rest - middle.to(tl.float32)).to(dtype)
    else:
        high, middle, low = w, w, w
    return high, middle, low


@triton.jit
def _add_product(acc, x, high, middle, low, THIRDS: tl.constexpr):
    """acc + x w as in fp32. THIRDS: x is bf16, and w comes in three such parts: three products. Else tf32x3 of w, which is
    `high`: 16-bit x is exact in tf32, w is split in two."""
    if THIRDS:
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, middle, acc)
        acc = tl.dot(x, high, acc)
    else:
        acc = tl.dot(x.to(tl.float32), high, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _gate_tile(
    x_ptr,
    w_ptr,
    partial_ptr,
    semaphore_ptr,
    T,
    tile,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BT: tl.constexpr,
    KC: tl.constexpr,
    SPLIT: tl.constexpr,
    EXPERT_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    THIRDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BT tokens times one of EXPERT_PARTS parts of the experts over one of SPLIT parts of D: fp32 partial logits
    [SPLIT, T, E_PAD]. Then the token block's semaphore counts one more."""
    BE: tl.constexpr = E_PAD // EXPERT_PARTS
    STEPS: tl.constexpr = (D + KC * SPLIT - 1) // (KC * SPLIT)
    EVEN: tl.constexpr = D % (KC * SPLIT) == 0 and E == E_PAD
    block = tile // (SPLIT * EXPERT_PARTS)
    split = tile % (SPLIT * EXPERT_PARTS) // EXPERT_PARTS
    n = tile % EXPERT_PARTS * BE + tl.arange(0, BE)
    first_k = split * (STEPS * KC)
    k = tl.arange(0, KC)
    rows = block * BT + tl.arange(0, BT)
    live = rows < T
    w_ptrs = w_ptr + n[None, :] * D + (first_k + k)[:, None]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * D + (first_k + k)[None, :]
    acc = tl.zeros((BT, BE), dtype=tl.float32)
    if STEPS == 1:  # weights are nobody's output: they are on their way while the kernel before still runs
        w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=(n < E)[None, :] & (first_k + k < D)[:, None], other=0.0)
        high, middle, low = _thirds(w, x_ptr.dtype.element_ty, THIRDS)
    # rows that nobody has touched lately come from memory: they, too, are asked for before the wait
    LINE: tl.constexpr = 1024 // x_ptr.dtype.element_ty.primitive_bitwidth
    line = first_k + tl.arange(0, (KC + LINE - 1) // LINE) * LINE
    present = x_ptr + tl.minimum(rows, T - 1).to(tl.int64)[:, None] * D
    for step in tl.static_range(STEPS):
        prefetch_lines(present + tl.minimum(line + step * KC, D - 1)[None, :], OVERLAP)
    wait_for_inputs(OVERLAP)
    if STEPS == 1:
        there = live[:, None] if EVEN else live[:, None] & (first_k + k < D)[None, :]
        x = tl.load(x_ptrs, mask=there, other=0.0)
        acc = _add_product(acc, x, high, middle, low, THIRDS)
    else:
        for step in tl.range(0, STEPS, num_stages=STAGES):
            if EVEN:
                w = tl.load(w_ptrs + step * KC)
                x = tl.load(x_ptrs + step * KC, mask=live[:, None], other=0.0)
            else:
                at = first_k + step * KC + k
                w = tl.load(w_ptrs + step * KC, mask=(n < E)[None, :] & (at < D)[:, None], other=0.0)
                x = tl.load(x_ptrs + step * KC, mask=live[:, None] & (at < D)[None, :], other=0.0)
            high, middle, low = _thirds(w, x_ptr.dtype.element_ty, THIRDS)
            acc = _add_product(acc, x, high, middle, low, THIRDS)
    base = partial_ptr + split * (T.to(tl.int64) * E_PAD) + rows.to(tl.int64)[:, None] * E_PAD
    tl.store(base + n[None, :], acc, mask=live[:, None])
    tl.debug_barrier()  # every thread's stores come before thread 0's release
    tl.atomic_add(semaphore_ptr + block, 1, sem="release")


@triton.jit(do_not_specialize=["T"])
def gate_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    active_ptr,
    partial_ptr,
    semaphore_ptr,
    ids_ptr,
    gates_ptr,
    T,
    gate_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
    KC: tl.constexpr,
    SPLIT: tl.constexpr,
    EXPERT_PARTS: tl.constexpr,
    CHOOSE: tl.constexpr,
    STAGES: tl.constexpr,
    THIRDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first programs compute a tile of partial logits each. Every other one waits for the tiles of its CHOOSE tokens,
    adds the parts of D in order and chooses. It waits for programs of smaller numbers alone, and those start first: no
    program waits for one that cannot start. `order` zeroes the semaphores."""
    tiles = (T + BT - 1) // BT * (SPLIT * EXPERT_PARTS)
    program = tl.program_id(0)
    if program < tiles:
        _gate_tile(
            x_ptr,
            w_ptr,
            partial_ptr,
            semaphore_ptr,
            T,
            program,
            D,
            E,
            E_PAD,
            BT,
            KC,
            SPLIT,
            EXPERT_PARTS,
            STAGES,
            THIRDS,
            OVERLAP,
        )
    else:
        wait_for_inputs(OVERLAP)
        first = (program - tiles) * CHOOSE
        rows = first + tl.arange(0, CHOOSE)
        live = rows < T
        e = tl.arange(0, E_PAD)
        while tl.atomic_add(semaphore_ptr + first // BT, 0, sem="acquire") < SPLIT * EXPERT_PARTS:
            pass
        tl.debug_barrier()  # no thread reads before thread 0's acquire
        ptrs = partial_ptr + rows.to(tl.int64)[:, None] * E_PAD + e[None, :]
        logits = sum_of_parts(ptrs, T.to(tl.int64) * E_PAD, live, bias_ptr, e, E, SPLIT, HAS_BIAS)
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        choose(logits, rows, live, e, active_ptr, ids_ptr, gates_ptr, gate_scale, E, TOP_K, HAS_ACTIVE, EPS, dtype)
