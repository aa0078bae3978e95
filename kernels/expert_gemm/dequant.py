"""PTX that turns two neighbouring packed words into pairs of 16-bit floats, built once at import.

Plane p of a word is its p-th code in the order of `packing.py`. Words come in pairs: word 0 of a pair holds the planes of
the lower half, word 1 those of the upper half, and a register (two 16-bit floats) holds features (i, i+1) of one plane,
which is what wgmma wants. fp16 values are integer codes minus their offset (8 or 128); bf16 values are that times 2^-6, so
sums of their products want BF16_PRODUCTS. Both are exact: nothing is rounded here.

bf16 has 7 bits of mantissa, too few for two nibbles behind a constant exponent. But exponent fields 0 and 1 share one unit,
2^-133, so the low byte of a half, all else masked out, is an integer of 8 bits in that unit. One multiplication by a power
of two (2^127 is the largest) brings it back, so one shift serves two nibbles, and a byte needs none.
"""

from __future__ import annotations

BF16_PRODUCTS = 64.0  # what sums of products with bf16 values are to be multiplied by

_CONSTANTS = {
    (4, "bf16"): (
        ".reg .b32 t, m, lower, upper;",
        ["mov.b32 m, 0xbe00be00;", "mov.b32 lower, 0x7f007f00;", "mov.b32 upper, 0x7d007d00;"],
    ),
    (4, "fp16"): (
        ".reg .b32 t, m, m16, sixteenth;",
        ["mov.b32 m, 0xe408e408;", "mov.b32 m16, 0xd480d480;", "mov.b32 sixteenth, 0x2c002c00;"],
    ),
    (8, "bf16"): (".reg .b32 m, unit;", ["mov.b32 m, 0xc000c000;", "mov.b32 unit, 0x7f007f00;"]),
    (8, "fp16"): (".reg .b32 t, m;", ["mov.b32 m, 0xe480e480;"]),
}


def _int4_plane(word: str, p: int, out: str, dtype: str) -> list[str]:
    """bf16: the nibble in units of 2^-133 (odd planes, which sit four bits higher: 2^-129), times 2^127 or 2^123, minus 8 *
    2^-6. fp16: even planes 1024 + code - 1032, odd planes (1024 + 16 code) / 16 - 72."""
    lines, source = _shifted(word, 8 * (p // 2))
    if dtype == "bf16":
        mask, factor = ("0x00f000f0", "upper") if p % 2 else ("0x000f000f", "lower")
        return [*lines, f"and.b32 {out}, {source}, {mask};", f"fma.rn.bf16x2 {out}, {out}, {factor}, m;"]
    if p % 2:
        return [
            *lines,
            f"lop3.b32 {out}, {source}, 0x00f000f0, 0x64006400, 0xea;",
            f"fma.rn.f16x2 {out}, {out}, sixteenth, m16;",
        ]
    return [*lines, f"lop3.b32 {out}, {source}, 0x000f000f, 0x64006400, 0xea;", f"add.rn.f16x2 {out}, {out}, m;"]


def _int8_plane(word: str, p: int, out: str, dtype: str) -> list[str]:
    """bf16: the byte in units of 2^-133 times 2^127, minus 128 * 2^-6. fp16: 1024 + code - 1152."""
    if dtype == "bf16":
        bytes_ = "0x4341" if p else "0x4240"  # bytes 1 and 3, or 0 and 2, each below a zero
        return [f"prmt.b32 {out}, {word}, 0, {bytes_};", f"fma.rn.bf16x2 {out}, {out}, unit, m;"]
    lines, source = _shifted(word, 8 * p)
    return [*lines, f"lop3.b32 {out}, {source}, 0x00ff00ff, 0x64006400, 0xea;", f"add.rn.f16x2 {out}, {out}, m;"]


def _shifted(word: str, bits: int) -> tuple[list[str], str]:
    return ([f"shr.u32 t, {word}, {bits};"], "t") if bits else ([], word)


def dequantize_ptx(bits: int, dtype: str, half: int, first: int = 0, planes: int = 0) -> tuple[str, str]:
    """Assembly and constraints for `tl.inline_asm_elementwise(..., pack=2)`: two words in, `planes` planes out.

    bits: 4 or 8; dtype: "bf16" or "fp16"; half 0: the lower planes, half 1: the upper ones; of a half the planes from
    `first` on (0 planes: all 16 // bits of them). Decoding little at a time keeps few registers alive.
    """
    planes = planes or 16 // bits
    plane = _int4_plane if bits == 4 else _int8_plane
    registers, constants = _CONSTANTS[bits, dtype]
    body = [line for i in range(planes) for line in plane(f"${planes + half}", first + i, f"${i}", dtype)]
    return "\n".join(["{", registers, *constants, *body, "}"]), ",".join(["=&r"] * planes + ["r", "r"])
