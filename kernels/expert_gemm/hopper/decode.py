"""Packed words to the register operand of a dot: one chunk of 64 input features of a step at a time.

A step holds KB = 1024 / BITS input features, 64 of them a chunk: two neighbouring planes of every word (../packing.py).
"""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.expert_gemm.dequant import dequantize_ptx


def _chunk(bits, dtype, chunk):
    """Assembly that decodes the two planes of chunk `chunk`."""
    half, first = (chunk, 0) if bits == 8 else (chunk // 2, chunk % 2 * 2)
    return gl.constexpr(dequantize_ptx(bits, dtype, half, first, 2)[0])


# [bits][dtype][chunk]: B = bf16, H = fp16
A4B0, A4B1, A4B2, A4B3 = (_chunk(4, "bf16", c) for c in range(4))
A4H0, A4H1, A4H2, A4H3 = (_chunk(4, "fp16", c) for c in range(4))
A8B0, A8B1 = (_chunk(8, "bf16", c) for c in range(2))
A8H0, A8H1 = (_chunk(8, "fp16", c) for c in range(2))
CONSTRAINTS = gl.constexpr("=&r,=&r,r,r")


@gluon.jit
def decode(words, CHUNK: gl.constexpr, BITS: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr, A: gl.constexpr):
    """Words [ROWS, 32] of a step -> codes minus their offset of chunk CHUNK (bf16: over BF16_PRODUCTS), [ROWS, 64], in
    the registers of a dot."""
    low, high = gl.split(gl.reshape(words, (ROWS, 16, 2)))  # only the word that holds the chunk stays alive
    word = high if CHUNK >= 8 // BITS else low
    pair = gl.convert_layout(gl.reshape(gl.join(word, word), (ROWS, 32)), A, assert_trivial=True)
    if BITS == 4 and dtype == gl.bfloat16:
        asm: gl.constexpr = A4B0 if CHUNK == 0 else (A4B1 if CHUNK == 1 else (A4B2 if CHUNK == 2 else A4B3))
    elif BITS == 4:
        asm: gl.constexpr = A4H0 if CHUNK == 0 else (A4H1 if CHUNK == 1 else (A4H2 if CHUNK == 2 else A4H3))
    elif dtype == gl.bfloat16:
        asm: gl.constexpr = A8B0 if CHUNK == 0 else A8B1
    else:
        asm: gl.constexpr = A8H0 if CHUNK == 0 else A8H1
    if dtype == gl.bfloat16:
        a, b = gl.inline_asm_elementwise(asm, CONSTRAINTS, [pair], dtype=(gl.bfloat16,) * 2, is_pure=True, pack=2)
    else:
        a, b = gl.inline_asm_elementwise(asm, CONSTRAINTS, [pair], dtype=(gl.float16,) * 2, is_pure=True, pack=2)
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), (ROWS, 64)), A, assert_trivial=True)
