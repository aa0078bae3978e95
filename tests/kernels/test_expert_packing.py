"""Packed expert weights: what lies where in a word."""

import pytest
import torch

from kernels.expert_gemm import PackedExperts, dequantize_reference, pack, unpack


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
