"""PTX that turns two neighbouring packed words into pairs of 16-bit floats, built once at import.

Plane j of a word is its j-th code in the order of `packing.py`. Words come in pairs: word 0 of a pair holds the planes of
the lower half, word 1 those of the upper half, and a register (two 16-bit floats) holds features (i, i+1) of one
plane, which is
what wgmma wants. Every value is an exact integer code minus its offset (8 or 128), so nothing is rounded here.
"""

from __future__ import annotations

_BF16_ONE = "0x3f803f80"


def _int4_bf16(word: str, dst: int) -> list[str]:
    """Or the nibble into 0x4300 (= 128 + code in bf16) and subtract 136."""
    lines = []
    for p in range(4):
        source = word
        if p:
            lines.append(f"shr.u32 t, {word}, {4 * p};")
            source = "t"
        lines.append(f"lop3.b32 ${dst + p}, {source}, 0x000f000f, 0x43004300, 0xea;")
        lines.append(f"fma.rn.bf16x2 ${dst + p}, ${dst + p}, one, m;")
    return lines


def _int4_fp16(word: str, dst: int) -> list[str]:
    """Even planes: 1024 + code - 1032. Odd planes sit four bits higher: (1024 + 16 code) / 16 - 72."""
    lines = [f"shr.u32 t, {word}, 8;"]
    for p in range(4):
        source = word if p < 2 else "t"
        mask = "0x00f000f0" if p % 2 else "0x000f000f"
        lines.append(f"lop3.b32 ${dst + p}, {source}, {mask}, 0x64006400, 0xea;")
        lines.append(
            f"fma.rn.f16x2 ${dst + p}, ${dst + p}, sixteenth, m16;" if p % 2 else f"add.rn.f16x2 ${dst + p}, ${dst + p}, m;"
        )
    return lines


def _int8_bf16(word: str, dst: int) -> list[str]:
    """128 + low seven bits, minus 256 or 128 as bit 7 says: (t & 0x80) ^ 0xc380 is -256 or -128."""
    lines = []
    for p in range(2):
        source = word
        if p:
            lines.append(f"shr.u32 t, {word}, 8;")
            source = "t"
        lines.append(f"lop3.b32 ${dst + p}, {source}, 0x007f007f, 0x43004300, 0xea;")
        lines.append(f"lop3.b32 c, {source}, 0x00800080, 0xc380c380, 0x6a;")
        lines.append(f"fma.rn.bf16x2 ${dst + p}, ${dst + p}, one, c;")
    return lines


def _int8_fp16(word: str, dst: int) -> list[str]:
    """1024 + code - 1152."""
    lines = []
    for p in range(2):
        source = word
        if p:
            lines.append(f"shr.u32 t, {word}, 8;")
            source = "t"
        lines.append(f"lop3.b32 ${dst + p}, {source}, 0x00ff00ff, 0x64006400, 0xea;")
        lines.append(f"add.rn.f16x2 ${dst + p}, ${dst + p}, m;")
    return lines


_DECODERS = {
    (4, "bf16"): (_int4_bf16, ".reg .b32 t, one, m;", [f"mov.b32 one, {_BF16_ONE};", "mov.b32 m, 0xc308c308;"]),
    (4, "fp16"): (
        _int4_fp16,
        ".reg .b32 t, m, m16, sixteenth;",
        ["mov.b32 m, 0xe408e408;", "mov.b32 m16, 0xd480d480;", "mov.b32 sixteenth, 0x2c002c00;"],
    ),
    (8, "bf16"): (_int8_bf16, ".reg .b32 t, c, one;", [f"mov.b32 one, {_BF16_ONE};"]),
    (8, "fp16"): (_int8_fp16, ".reg .b32 t, m;", ["mov.b32 m, 0xe480e480;"]),
}


def dequantize_ptx(bits: int, dtype: str, half: int) -> tuple[str, str]:
    """Assembly and constraints for `tl.inline_asm_elementwise(..., pack=2)`: two words in, 16 // bits planes out.

    bits: 4 or 8; dtype: "bf16" or "fp16"; half 0: the lower planes, half 1: the upper ones. Decoding by halves keeps fewer
    registers alive.
    """
    decoder, registers, constants = _DECODERS[bits, dtype]
    planes = 16 // bits
    lines = ["{", registers, *constants, *decoder(f"${planes + half}", 0), "}"]
    return "\n".join(lines), ",".join(["=&r"] * planes + ["r", "r"])
