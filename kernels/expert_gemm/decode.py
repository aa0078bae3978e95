"""Packed words to planes of 16-bit floats or fp32, in registers: by assembly on a GPU, by plain operations elsewhere.

A plane is 32 neighbouring input features of BN output features; PLANES = 32 // BITS of them lie in [BN, 32] words
(packing.py). They are decoded by halves, so that few registers are alive. bf16 by assembly comes out over BF16_PRODUCTS
(dequant.py), everything else as it is.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.expert_gemm.dequant import dequantize_ptx

# [bits][dtype][half]: A = assembly, C = constraints, B = bf16, H = fp16, 0 = lower planes, 1 = upper planes
A4B0, C4 = (tl.constexpr(s) for s in dequantize_ptx(4, "bf16", 0))
A4B1, _ = (tl.constexpr(s) for s in dequantize_ptx(4, "bf16", 1))
A4H0, _ = (tl.constexpr(s) for s in dequantize_ptx(4, "fp16", 0))
A4H1, _ = (tl.constexpr(s) for s in dequantize_ptx(4, "fp16", 1))
A8B0, C8 = (tl.constexpr(s) for s in dequantize_ptx(8, "bf16", 0))
A8B1, _ = (tl.constexpr(s) for s in dequantize_ptx(8, "bf16", 1))
A8H0, _ = (tl.constexpr(s) for s in dequantize_ptx(8, "fp16", 0))
A8H1, _ = (tl.constexpr(s) for s in dequantize_ptx(8, "fp16", 1))


@triton.jit
def _pair(even, odd, BN: tl.constexpr):
    """Interleave two [BN, 16] halves to [BN, 32]."""
    return tl.reshape(tl.join(even, odd), (BN, 32))


@triton.jit
def _plane(w, shift: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr):
    mask: tl.constexpr = (1 << BITS) - 1
    offset: tl.constexpr = 1 << (BITS - 1)
    even = (w >> shift) & mask
    odd = (w >> (shift + 16)) & mask
    return (_pair(even, odd, BN) - offset).to(dtype)


@triton.jit
def decode4(w, HALF: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """Planes 4 * HALF to 4 * HALF + 3 of [BN, 32] words: code - 8 (bf16 by assembly: over BF16_PRODUCTS)."""
    if ASM and dtype == tl.float16:
        planes = tl.inline_asm_elementwise(A4H1 if HALF else A4H0, C4, [w], dtype=(tl.float16,) * 4, is_pure=True, pack=2)
    elif ASM:
        planes = tl.inline_asm_elementwise(A4B1 if HALF else A4B0, C4, [w], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2)
    else:
        low, high = tl.split(tl.reshape(w, (BN, 16, 2)))
        half = high if HALF else low
        planes = (
            _plane(half, 0, 4, BN, dtype),
            _plane(half, 4, 4, BN, dtype),
            _plane(half, 8, 4, BN, dtype),
            _plane(half, 12, 4, BN, dtype),
        )
    return planes


@triton.jit
def decode8(w, HALF: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """Planes 2 * HALF and 2 * HALF + 1 of [BN, 32] words: code - 128 (bf16 by assembly: over BF16_PRODUCTS)."""
    if ASM and dtype == tl.float16:
        planes = tl.inline_asm_elementwise(A8H1 if HALF else A8H0, C8, [w], dtype=(tl.float16,) * 2, is_pure=True, pack=2)
    elif ASM:
        planes = tl.inline_asm_elementwise(A8B1 if HALF else A8B0, C8, [w], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2)
    else:
        low, high = tl.split(tl.reshape(w, (BN, 16, 2)))
        half = high if HALF else low
        planes = (_plane(half, 0, 8, BN, dtype), _plane(half, 8, 8, BN, dtype))
    return planes
