"""The one place where a kernel meets those before it in the stream and those after it (programmatic dependent launch).

OVERLAP, and the launch option with it, come from `kernels.launch.overlap`. Kernels in Gluon may call the first three.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

# One thread asks the copy engine to bring [$1, $1 + $2) bytes into L2; both are multiples of 16.
_PREFETCH_PIECE = tl.constexpr(
    "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
    "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}"
)
_FENCE_FOR_HOST = tl.constexpr("fence.acq_rel.sys; mov.b32 $0, 0;")
_PREFETCH_LINE = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")


@triton.jit
def wait_for_kernels_before(OVERLAP: tl.constexpr):
    """What they wrote is there from here on, and what they read may be written over."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next kernel may start once every program of this one has come here, or is over. Where that is before the wait,
    kernels before this one may still run then, too: what the next one reads before its own wait must not be theirs."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Before this line a kernel may touch nothing but weights: its inputs may still be being written, and its outputs read,
    by the kernels before. After it the next kernel may start in the same way."""
    wait_for_kernels_before(OVERLAP)
    let_next_start(OVERLAP)


@triton.jit
def let_next_start_and_wait(OVERLAP: tl.constexpr):
    """As `wait_for_inputs`, but the next kernel may start before this one waits, so beside the kernels before this one."""
    let_next_start(OVERLAP)
    wait_for_kernels_before(OVERLAP)


@triton.jit
def ask_for_bytes(ptr, size):
    """One thread asks for `size` bytes from the scalar `ptr` on in L2; address and size are multiples of 16."""
    tl.inline_asm_elementwise(_PREFETCH_PIECE, "=r,l,r", [ptr.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_piece(ptr, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    """Ask for SIZE bytes from the scalar `ptr` on in L2. Inputs may be asked for before the wait: whoever still writes them
    writes to L2 too. Nothing is asked for without OVERLAP, or where SIZE is no multiple of 16."""
    if OVERLAP and SIZE % 16 == 0:
        ask_for_bytes(ptr.to(tl.int64) & -16, SIZE)


@triton.jit
def prefetch_lines(ptrs, OVERLAP: tl.constexpr):
    """Ask for the 128-byte lines of these addresses in L2, as `prefetch_piece` does for one piece."""
    if OVERLAP:
        tl.inline_asm_elementwise(_PREFETCH_LINE, "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def tell_host(ptr, value, ON_GPU: tl.constexpr):
    """Store the scalar `value` in memory of the host, which may read it at any time: what this program has stored before is
    there by then. Without ON_GPU (Triton's interpreter) whoever reads comes later anyway."""
    if ON_GPU:
        tl.debug_barrier()
        tl.inline_asm_elementwise(_FENCE_FOR_HOST, "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(ptr, value)
