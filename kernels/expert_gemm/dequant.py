"""PTX that turns two neighbouring packed words into pairs of 16-bit floats, built once at import.

Plane p of a word is its p-th code in the order of `packing.py`. Words come in pairs: word 0 of a pair holds the planes of
the lower half, word 1 those of the upper half, and a register (two 16-bit floats) holds features (i, i+1) of one plane,
which is what wgmma wants. Every value is an exact integer code minus its offset (8 or 128), so nothing is rounded here.
"""

from __future__ import annotations

_CONSTANTS = {
    (4, "bf16"): (".reg .b32 t, one, m;", ["mov.b32 one, 0x3f803f80;", "mov.b32 m, 0xc308c308;"]),
    (4, "fp16"): (
        ".reg .b32 t, m, m16, sixteenth;",
        ["mov.b32 m, 0xe408e408;", "mov.b32 m16, 0xd480d480;", "mov.b32 sixteenth, 0x2c002c00;"],
    ),
    (8, "bf16"): (".reg .b32 t, c, one;", ["mov.b32 one, 0x3f803f80;"]),
    (8, "fp16"): (".reg .b32 t, m;", ["mov.b32 m, 0xe480e480;"]),
}


def _int4_plane(word: str, p: int, out: str, dtype: str) -> list[str]:
    """bf16: the nibble ored into 0x4300 (128 + code), minus 136. fp16: even planes 1024 + code - 1032, odd planes, which sit
    four bits higher, (1024 + 16 code) / 16 - 72."""
    shift = 4 * p if dtype == "bf16" else 8 * (p // 2)
    lines, source = _shifted(word, shift)
    if dtype == "bf16":
        return [*lines, f"lop3.b32 {out}, {source}, 0x000f000f, 0x43004300, 0xea;", f"fma.rn.bf16x2 {out}, {out}, one, m;"]
    if p % 2:
        return [
            *lines,
            f"lop3.b32 {out}, {source}, 0x00f000f0, 0x64006400, 0xea;",
            f"fma.rn.f16x2 {out}, {out}, sixteenth, m16;",
        ]
    return [*lines, f"lop3.b32 {out}, {source}, 0x000f000f, 0x64006400, 0xea;", f"add.rn.f16x2 {out}, {out}, m;"]


def _int8_plane(word: str, p: int, out: str, dtype: str) -> list[str]:
    """bf16: 128 + low seven bits, minus 256 or 128 as bit 7 says: (t & 0x80) ^ 0xc380 is -256 or -128. fp16: 1024 + code -
    1152."""
    lines, source = _shifted(word, 8 * p)
    if dtype == "bf16":
        return [
            *lines,
            f"lop3.b32 {out}, {source}, 0x007f007f, 0x43004300, 0xea;",
            f"lop3.b32 c, {source}, 0x00800080, 0xc380c380, 0x6a;",
            f"fma.rn.bf16x2 {out}, {out}, one, c;",
        ]
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
