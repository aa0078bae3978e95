"""Expert stacks in the layout of the expert GEMM kernels, and the view of any stack that those kernels take.

Legend: E experts, N output features, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import QuantScheme
from engine.quantization.expert_stack import DenseExpertStack, ExpertStack
from engine.quantization.symmetric import QuantizedTensor, quantize
from kernels.expert_gemm.packing import PackedExperts, pack, packed_shape, scale_shape, unquantized
from kernels.expert_gemm.reference import dequantize_reference


class PackedExpertStack(ExpertStack):
    """Integer codes in the packed layout, the only copy of them. Filled one expert at a time, on the device."""

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: QuantScheme,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, dtype)
        self._scheme = scheme
        self._group_size = scheme.group_size or 0
        shape = (num_experts, out_features, in_features, scheme.bits)
        self.packed = PackedExperts(
            torch.zeros(packed_shape(*shape), dtype=torch.int32, device=device),
            torch.zeros(scale_shape(*shape, self._group_size), dtype=torch.float32, device=device),
            scheme.bits,
            self._group_size,
            out_features,
            in_features,
        )

    @property
    def scheme(self) -> QuantScheme:
        """How the matrices are stored."""
        return self._scheme

    @property
    def num_bytes(self) -> int:
        """Bytes held in memory."""
        return self.packed.bytes_per_expert * self.num_experts

    def set_weight(self, expert: int, weight: Tensor) -> None:
        """Quantize on the device and store."""
        self.set_quantized(expert, quantize(weight.to(self.packed.data.device), self._scheme))

    def set_quantized(self, expert: int, quantized: QuantizedTensor) -> None:
        """Store. Raises ValueError when scheme or shape differ from the stack's."""
        self.check_fits(expert, quantized)
        place = self.packed.expert(expert)
        assert place.scales is not None
        one = _pack_one(quantized, place.data.device)
        assert one.scales is not None
        place.data.copy_(one.data)
        place.scales.copy_(one.scales)

    def dequantized(self, expert: int) -> Tensor:
        """float32 [N, K]."""
        return dequantize_reference(self.packed.expert(expert))[0]

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N], without the kernels: what the plain path computes."""
        return functional.linear(x, self.dequantized(expert).to(x.dtype), bias)


def packed_experts(stack: ExpertStack, device: torch.device) -> PackedExperts:
    """What the kernels read for this stack: shared memory where its layout allows (packed, or unquantized), else a copy."""
    if isinstance(stack, PackedExpertStack):
        return stack.packed
    if isinstance(stack, DenseExpertStack):
        return unquantized(stack.weight)
    matrices = (stack.dequantized(expert).to(device) for expert in range(stack.num_experts))
    if stack.scheme is None:
        return unquantized(torch.stack([matrix.to(stack.dtype) for matrix in matrices]))
    copy = PackedExpertStack(stack.num_experts, stack.out_features, stack.in_features, stack.dtype, device, stack.scheme)
    for expert in range(stack.num_experts):
        copy.set_quantized(expert, stack.quantized(expert))
    return copy.packed


def _pack_one(quantized: QuantizedTensor, device: torch.device) -> PackedExperts:
    group_size = quantized.scheme.group_size or 0
    codes = quantized.codes.to(device)
    on_device = QuantizedTensor(codes, quantized.scales.to(device), quantized.scheme, quantized.num_features)
    scales = on_device.scales.float()[None]
    return pack(
        on_device.unpacked_codes()[None], scales if group_size else scales[..., 0], quantized.scheme.bits, group_size
    )
