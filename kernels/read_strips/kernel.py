"""A kernel that only reads."""

import triton
import triton.language as tl


@triton.jit
def read_strips_kernel(words_ptr, sums_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[program] = the sum of its WORDS neighbouring words, which wraps round."""
    program = tl.program_id(0)
    word_ptrs = words_ptr + program.to(tl.int64) * WORDS + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for _ in range(WORDS // BLOCK):
        total += tl.load(word_ptrs)
        word_ptrs += BLOCK
    tl.store(sums_ptr + program, tl.sum(total, 0))
