"""Codes, scales, packing: exactness where it is promised, error where it is bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import QuantScheme
from engine.quantization.symmetric import (
    QuantizationError,
    QuantizedTensor,
    num_groups,
    pack_int4,
    quantize,
    relative_error,
    unpack_int4,
)

SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (None, 64, 128)]
SHAPES = [(1, 1), (5, 2), (3, 65), (7, 130), (16, 256)]


def normal(shape: tuple[int, int], seed: int = 0, spread: float = 0.03) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 4), features=st.integers(1, 33), seed=st.integers(0, 999))
def test_int4_packing_round_trips(rows: int, features: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, features), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, (features + 1) // 2) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, features), codes)


def test_nibble_order() -> None:
    """Even k in the low nibble, value + 8."""
    assert pack_int4(torch.tensor([[-8, 7, 1]], dtype=torch.int8)).tolist() == [[0xF0, 0x89]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_values_are_codes_times_scales(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = normal(shape)
    quantized = quantize(weight, scheme)
    n, k = shape
    assert quantized.shape == shape
    assert quantized.scales.shape == (n, num_groups(scheme, k))
    assert quantized.num_bytes == quantized.codes.numel() + 2 * quantized.scales.numel()
    codes, width = quantized.unpacked_codes(), scheme.group_size or k
    limits = (-8, 7) if scheme.bits == 4 else (-127, 127)
    assert limits[0] <= int(codes.min()) and int(codes.max()) <= limits[1]
    slow = torch.tensor([[int(codes[i, j]) * float(quantized.scales[i, j // width]) for j in range(k)] for i in range(n)])
    assert torch.equal(quantized.dequantize(), slow)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_quantized_weights_are_fixed_points(scheme: QuantScheme) -> None:
    """A matrix that the codes can represent with its own absmax scale comes back exactly, and a second run is identical."""
    quantized = quantize(normal((16, 256)), scheme)
    again = quantize(normal((16, 256)), scheme)
    assert torch.equal(quantized.codes, again.codes) and torch.equal(quantized.scales, again.scales)
    top = 7 if scheme.bits == 4 else 127
    codes = torch.randint(-top, top + 1, (4, 256), generator=torch.Generator().manual_seed(1))
    codes[:, ::64] = top  # every group reaches the largest code
    exact = codes * 2.0**-6
    assert torch.equal(quantize(exact, scheme).dequantize(), exact)


@pytest.mark.parametrize(
    ("name", "most"),
    [("w8a16", 0.0085), ("w8a16-g128", 0.0068), ("w8a16-g64", 0.0061), ("w4a16", 0.110), ("w4a16-g128", 0.103),
     ("w4a16-g64", 0.097)],
)  # fmt: skip
def test_error_on_normal_weights(name: str, most: float) -> None:
    scheme = QuantScheme.from_name(name)
    assert scheme is not None
    weight = normal((128, 2048))
    assert 0.5 * most < relative_error(weight, quantize(weight, scheme)) < most


def test_clipping_beats_plain_absmax_scaling_on_every_row() -> None:
    for weight in (normal((64, 512)), normal((64, 512)) ** 3):
        quantized = quantize(weight, QuantScheme(4))
        plain_scales = weight.abs().amax(1, keepdim=True) / 7
        plain = (weight / plain_scales).round() * plain_scales
        clipped_error = (quantized.dequantize() - weight).square().sum(1)
        assert (clipped_error <= (plain - weight).square().sum(1) * 1.02).all()  # 2 %: scales are rounded to bf16
        assert clipped_error.sum() < 0.8 * (plain - weight).square().sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("spread", [1e-9, 1e-5, 1e-3, 1.0, 1e4])
def test_scales_are_exact_in_bf16_and_fp16(scheme: QuantScheme, spread: float) -> None:
    quantized = quantize(normal((8, 130), spread=spread), scheme)
    scales = quantized.scales.float()
    assert (scales > 0).all()
    assert torch.equal(scales.bfloat16().float(), scales)


def test_a_zero_row_and_a_zero_matrix() -> None:
    weight = normal((3, 64))
    weight[1] = 0.0
    quantized = quantize(weight, QuantScheme(4))
    assert quantized.dequantize()[1].eq(0.0).all() and quantized.dequantize()[0].ne(0.0).any()
    zero = torch.zeros(2, 3)
    assert relative_error(zero, quantize(zero, QuantScheme(8))) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    weight = normal((4, 66)).to(dtype)
    expected = quantize(weight.float(), QuantScheme(4, 64))
    assert torch.equal(quantize(weight, QuantScheme(4, 64)).codes, expected.codes)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, torch.nan]]), "NaN or infinity"),
        (torch.tensor([[1.0, torch.inf]]), "NaN or infinity"),
        (torch.ones(3), "give a float matrix"),
        (torch.ones(3, 3, dtype=torch.int8), "give a float matrix"),
        (torch.full((2, 2), 1e9), "does not fit fp16"),
    ],
)
def test_what_cannot_be_quantized(weight: Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(weight, QuantScheme(8))


def test_dequantize_rounds_once_to_the_dtype_asked_for() -> None:
    quantized = QuantizedTensor(torch.tensor([[127]], dtype=torch.int8), torch.tensor([[0.01]]).half(), QuantScheme(8), 1)
    expected = torch.tensor(127 * float(torch.tensor(0.01).half())).bfloat16()
    assert quantized.dequantize(torch.bfloat16).item() == expected.item()
