"""Packed expert weights: what lies where in a word, and the assembly that takes it out again."""

import pytest
import torch

from kernels.expert_gemm import PackedExperts, dequantize_reference, pack, unpack
from kernels.expert_gemm.dequant import BF16_PRODUCTS, dequantize_ptx


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 256), (70, 300), (129, 511)])
def test_pack_round_trip(bits: int, group: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (3, n, k), dtype=torch.int8, generator=generator)
    scales = torch.rand((3, n, -(-k // group)) if group else (3, n), generator=generator)
    back, back_scales = unpack(pack(codes, scales, bits, group))
    assert torch.equal(back, codes)
    assert torch.equal(back_scales, scales)


def test_packed_words_are_the_documented_layout() -> None:
    codes = torch.zeros(1, 64, 256, dtype=torch.int8)
    codes[0, 5, 3 * 32 + 2 * 7 + 1] = 7  # plane 3, pair 7, side 1: word 14, high half, nibble 3
    codes[0, 5, 6 * 32 + 2 * 7] = -8  # plane 6: word 15, low half, nibble 2
    words = pack(codes, torch.ones(1, 64), 4).data[0, 0, 0, 5].long() & 0xFFFFFFFF
    zero = 0x88888888
    assert words[14] == zero ^ (0x8 << 28) ^ (0xF << 28)
    assert words[15] == zero ^ (0x8 << 8)
    assert sum(int(w) != zero for w in words) == 2


def test_dequantized_matrix_is_code_times_group_scale() -> None:
    codes = torch.full((1, 64, 256), 3, dtype=torch.int8)
    scales = torch.arange(1.0, 129.0).view(1, 64, 2)
    matrix = dequantize_reference(pack(codes, scales, 4, 128))
    assert matrix[0, 10, 127] == 3 * 21
    assert matrix[0, 10, 128] == 3 * 22


def test_wrong_layout_version_names_the_fix() -> None:
    packed = pack(torch.zeros(1, 64, 256, dtype=torch.int8), torch.ones(1, 64), 4)
    with pytest.raises(ValueError, match="convert again"):
        PackedExperts(packed.data, packed.scales, 4, 0, 64, 256, layout_version=99)


def words_of(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of packed words [n, 2] that hold every one of the 65,536 halves on both sides of a word, beside another half,
    and their codes [n, 64 / bits, 2]: plane, side."""
    order = torch.Generator().manual_seed(bits)
    halves, others = torch.arange(65536), torch.randperm(65536, generator=order)
    words = torch.cat([halves | others << 16, others | halves << 16])
    words = torch.stack([words, words[torch.randperm(len(words), generator=order)]], dim=1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    per_word = 16 // bits  # planes of a word
    codes = torch.empty(len(words), 2 * per_word, 2, dtype=torch.int64)
    for plane in range(2 * per_word):
        for side in (0, 1):
            shift = 16 * side + bits * (plane % per_word)
            codes[:, plane, side] = (words[:, plane // per_word] >> shift) & ((1 << bits) - 1)
    return words, codes - (1 << (bits - 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_follow_the_packed_layout(bits: int) -> None:
    """Packed from their codes, the same words come out: 16 pairs are a row of a block."""
    words, codes = words_of(bits)
    planes = codes.view(-1, 64, 16, 32 // bits, 2)  # [block, row, pair, plane, side]
    matrix = planes.permute(1, 0, 3, 2, 4).reshape(1, 64, -1)
    assert torch.equal(pack(matrix.to(torch.int8), torch.ones(1, 64), bits).data.view(-1, 2), words)


def permuted_bytes(a: torch.Tensor, b: torch.Tensor, selector: int) -> torch.Tensor:
    """prmt.b32: nibble i of the selector says which of the eight bytes of a (0 to 3) and b (4 to 7) becomes byte i."""
    both, taken = a | b << 32, torch.zeros_like(a)
    for i in range(4):
        taken |= (both >> 8 * (selector >> 4 * i & 0x7) & 0xFF) << 8 * i
    return taken


def run_ptx(assembly: str, words: torch.Tensor, outputs: int, float_dtype: torch.dtype) -> list[torch.Tensor]:
    """Interpret the few instructions that the decoders use on every pair of words; each result as two floats [n, 2]."""
    names = {f"${outputs + i}": words[:, i].long() & 0xFFFFFFFF for i in range(2)}

    def value(name: str) -> torch.Tensor:
        return torch.tensor(int(name, 0)) if name[0].isdigit() else names[name]

    def floats(name: str) -> torch.Tensor:
        bits = torch.stack((value(name) & 0xFFFF, value(name) >> 16), dim=-1)
        return bits.to(torch.uint16).view(float_dtype).double()

    for line in assembly.splitlines()[2:-1]:  # without braces and declarations
        operation, rest = line.rstrip(";").split(" ", 1)
        out, *arguments = (part.strip() for part in rest.split(","))
        if operation == "mov.b32":
            names[out] = value(arguments[0])
        elif operation == "shr.u32":
            names[out] = value(arguments[0]) >> int(arguments[1])
        elif operation == "and.b32":
            names[out] = value(arguments[0]) & value(arguments[1])
        elif operation == "lop3.b32":
            assert int(arguments[3], 0) == 0xEA
            names[out] = (value(arguments[0]) & value(arguments[1])) | value(arguments[2])
        elif operation == "prmt.b32":
            names[out] = permuted_bytes(*map(value, arguments[:2]), int(arguments[2], 0))
        else:
            a, b = floats(arguments[0]), floats(arguments[1])
            exact = a + b if operation.startswith("add") else a * b + floats(arguments[2])
            rounded = exact.to(float_dtype).view(torch.uint16).long()
            names[out] = rounded[..., 0] | rounded[..., 1] << 16
    return [floats(f"${i}") for i in range(outputs)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("half", [0, 1])
def test_assembly_decodes_every_half_of_a_word(bits: int, dtype: str, half: int) -> None:
    words, codes = words_of(bits)
    float_dtype, factor = (torch.bfloat16, BF16_PRODUCTS) if dtype == "bf16" else (torch.float16, 1.0)
    per_half = 16 // bits
    for first in range(0, per_half, 2):
        assembly, constraints = dequantize_ptx(bits, dtype, half, first, 2)
        assert constraints == "=&r,=&r,r,r"
        for i, plane in enumerate(run_ptx(assembly, words, 2, float_dtype)):
            assert torch.equal(plane * factor, codes[:, half * per_half + first + i].double())
    assembly, _ = dequantize_ptx(bits, dtype, half)
    for p, plane in enumerate(run_ptx(assembly, words, per_half, float_dtype)):
        assert torch.equal(plane * factor, codes[:, half * per_half + p].double())
