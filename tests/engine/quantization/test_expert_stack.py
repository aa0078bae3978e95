"""Every storage form of an expert stack against plain fp32 matmul with the dequantized matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config import QuantScheme
from engine.quantization.cpu_experts import (
    ExpandedExpertStack,
    OneDnnExpertStack,
    PackedInt4ExpertStack,
    PackedInt8ExpertStack,
    allocate_expert_stack,
)
from engine.quantization.expert_stack import DenseExpertStack, ExpertGroups, ExpertStack, QuantizedExpertStack
from engine.quantization.onednn import can_pack
from engine.quantization.symmetric import quantize

CPU = torch.device("cpu")
EXPERTS = 3


def filled(n: int, k: int, precision: str, dtype: torch.dtype, *, many_tokens: bool = False) -> tuple[ExpertStack, Tensor]:
    """Stack and the fp32 matrices [E, N, K] that it stands for."""
    generator = torch.Generator().manual_seed(n * k)
    weights = torch.randn((EXPERTS, n, k), generator=generator) * 0.05
    scheme = QuantScheme.from_name(precision)
    stack = allocate_expert_stack(EXPERTS, n, k, dtype, CPU, scheme, many_tokens=many_tokens)
    for expert in (2, 0, 1):
        stack.set_weight(expert, weights[expert])
    if scheme is not None:
        weights = torch.stack([quantize(weight, scheme).dequantize() for weight in weights])
    return stack, weights.to(dtype).float() if scheme is None else weights


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("n", "k", "precision", "few_kind", "many_kind"),
    [
        (32, 64, "w8a16", PackedInt8ExpertStack, ExpandedExpertStack),
        (27, 48, "w8a16", PackedInt8ExpertStack, ExpandedExpertStack),  # odd N is fine
        (32, 40, "w8a16", ExpandedExpertStack, ExpandedExpertStack),  # such a K would crash the kernel
        (32, 128, "w8a16-g64", ExpandedExpertStack, ExpandedExpertStack),
        (32, 256, "w4a16", PackedInt4ExpertStack, ExpandedExpertStack),
        (48, 96, "w4a16", PackedInt4ExpertStack, ExpandedExpertStack),  # kernel group 32, N not a multiple of 64
        (16, 192, "w4a16", PackedInt4ExpertStack, ExpandedExpertStack),
        (64, 128, "w4a16-g64", PackedInt4ExpertStack, ExpandedExpertStack),
        (64, 256, "w4a16-g128", PackedInt4ExpertStack, ExpandedExpertStack),
        (32, 96, "w4a16-g64", QuantizedExpertStack, QuantizedExpertStack),  # a short last group
        (27, 36, "w4a16", ExpandedExpertStack, ExpandedExpertStack),
        (5, 65, "w4a16-g64", QuantizedExpertStack, QuantizedExpertStack),
        (5, 33, "w4a16", QuantizedExpertStack, QuantizedExpertStack),  # half a byte at the end of a row
    ],
)
@pytest.mark.parametrize("many_tokens", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
def test_quantized_bf16_stacks_on_the_cpu(
    n: int, k: int, precision: str, few_kind: type[ExpertStack], many_kind: type[ExpertStack], many_tokens: bool, tokens: int
) -> None:
    stack, weights = filled(n, k, precision, torch.bfloat16, many_tokens=many_tokens)
    assert type(stack) is (many_kind if many_tokens else few_kind)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, k), generator=generator).bfloat16()
    bias = torch.randn((EXPERTS, n), generator=generator).bfloat16()
    for expert in range(EXPERTS):
        expected = x.float() @ weights[expert].T + bias[expert].float()
        assert relative(stack.linear(expert, x, bias[expert]), expected) < 0.01
        assert relative(stack.dequantized(expert), weights[expert]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 7), (64, 256)])
def test_unquantized_stacks_keep_the_weights(n: int, k: int, dtype: torch.dtype) -> None:
    stack, weights = filled(n, k, "bf16", dtype)
    assert isinstance(stack, OneDnnExpertStack if can_pack(dtype, CPU) else DenseExpertStack)
    x = torch.randn((9, k), generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn((EXPERTS, n), generator=torch.Generator().manual_seed(2)).to(dtype)
    for expert in range(EXPERTS):
        assert torch.equal(stack.dequantized(expert), weights[expert])
        expected = x.float() @ weights[expert].T + bias[expert].float()
        assert relative(stack.linear(expert, x, bias[expert]), expected) < (1e-6 if dtype == torch.float32 else 0.004)


def test_an_expert_that_was_never_set() -> None:
    stack = allocate_expert_stack(2, 4, 4, torch.float32, CPU, None, many_tokens=False)
    if not isinstance(stack, OneDnnExpertStack):
        pytest.skip("this CPU has no packed layout")
    with pytest.raises(RuntimeError, match="expert 1 was never set"):
        stack.linear(1, torch.ones(1, 4), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "w8a16", "w8a16-g64", "w4a16", "w4a16-g64", "w4a16-g128"])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (5, 129)])
def test_plain_stacks(n: int, k: int, precision: str, dtype: torch.dtype) -> None:
    stack, weights = filled(n, k, precision, dtype)
    x = torch.randn((4, k), generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn((EXPERTS, n), generator=torch.Generator().manual_seed(2)).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    for expert in range(EXPERTS):
        expected = x.float() @ weights[expert].T + bias[expert].float()
        assert relative(stack.linear(expert, x, bias[expert]), expected) < tolerance


@pytest.mark.parametrize("precision", ["w8a16", "w4a16", "w4a16-g64", "w4a16-g128"])
def test_fast_paths_agree_with_the_plain_path(precision: str) -> None:
    """Same codes, same scales: packed kernels and table look-ups differ from the dequantize path by bf16 rounding only."""
    scheme = QuantScheme.from_name(precision)
    assert scheme is not None
    packed, _ = filled(64, 256, precision, torch.bfloat16)
    expanded, _ = filled(64, 256, precision, torch.bfloat16, many_tokens=True)
    plain = QuantizedExpertStack(EXPERTS, 64, 256, torch.bfloat16, CPU, scheme)
    assert isinstance(packed, QuantizedExpertStack)
    plain.codes.copy_(packed.codes)
    plain.scales.copy_(packed.scales)
    x = torch.randn((9, 256), generator=torch.Generator().manual_seed(3)).bfloat16()
    bias = torch.zeros(64, dtype=torch.bfloat16)
    expected = plain.linear(1, x, bias).float()
    assert relative(packed.linear(1, x, bias), expected) < 0.006
    assert relative(expanded.linear(1, x, bias), expected) < 0.006


@pytest.mark.parametrize("precision", ["fp32", "w4a16"])
def test_grouped_linear_skips_empty_experts(precision: str) -> None:
    torch.manual_seed(0)
    stack, weights = filled(16, 32, precision, torch.float32)
    counts = torch.tensor([0, 5, 2])
    groups = ExpertGroups.from_counts(counts)
    assert groups.hit == ((1, 0, 5), (2, 5, 7))
    x, bias = torch.randn(7, 32), torch.randn(EXPERTS, 16)
    expected = torch.cat([x[:5] @ weights[1].T + bias[1], x[5:] @ weights[2].T + bias[2]])
    torch.testing.assert_close(stack.grouped_linear(x, bias, groups), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["w8a16", "w4a16", "w4a16-g64"])
def test_a_quantized_matrix_of_another_kind_is_refused(precision: str) -> None:
    scheme = QuantScheme.from_name(precision)
    stack = allocate_expert_stack(2, 16, 64, torch.bfloat16, CPU, scheme, many_tokens=False)
    with pytest.raises(ValueError, match="this stack holds"):
        stack.set_quantized(0, quantize(torch.ones(16, 64), QuantScheme(8, 128)))
    with pytest.raises(ValueError, match=r"\(16, 32\)"):
        stack.set_quantized(0, quantize(torch.ones(16, 32), scheme or QuantScheme(8)))
    dense = allocate_expert_stack(2, 16, 64, torch.bfloat16, CPU, None, many_tokens=False)
    with pytest.raises(ValueError, match="unquantized"):
        dense.set_quantized(0, quantize(torch.ones(16, 64), QuantScheme(8)))


def test_bytes_held() -> None:
    n, k = 64, 256
    held = {name: filled(n, k, name, torch.bfloat16)[0].num_bytes for name in ("bf16", "w8a16", "w4a16")}
    assert held["bf16"] == EXPERTS * n * k * 2
    assert held["w8a16"] == EXPERTS * n * (k + 2)
    assert held["w4a16"] == EXPERTS * n * (k // 2 + 2) + EXPERTS * n * (k // 2 + 4)  # canonical, and the kernel's copy
    assert filled(n, k, "w4a16", torch.bfloat16, many_tokens=True)[0].num_bytes == EXPERTS * n * (k // 2 + 2)
