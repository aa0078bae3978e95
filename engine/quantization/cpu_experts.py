"""Expert stacks on the CPU's fast paths, and the choice among all stacks.

Legend: E experts, N output features, K input features, G scale groups per output feature, t tokens of one expert.

For bf16 activations there are two ways to use integer weights. torch's packed kernels multiply straight from them and win
while an expert has few tokens; expanding the codes to bf16 and multiplying densely wins from about 24 tokens on (one core
with AMX, [512, 256] int4: packed 3 us per token, expanded 80 us in all). The choice is made once per stack, by who uses it,
never by the number of tokens: two roundings for one token would make a sentence depend on its batch mates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import QuantScheme
from engine.quantization.expert_stack import DenseExpertStack, ExpertStack, QuantizedExpertStack
from engine.quantization.onednn import can_pack, pack, packed_linear
from engine.quantization.packed_experts import PackedExpertStack
from engine.quantization.symmetric import QuantizedTensor


def allocate_expert_stack(
    num_experts: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    scheme: QuantScheme | None,
    *,
    many_tokens: bool,
) -> ExpertStack:
    """The fastest stack that is right for these shapes: empty, to be filled with set_weight/set_quantized.

    many_tokens: an expert usually gets dozens of tokens at once (encoder), not a handful (decoder).
    """
    shape = (num_experts, out_features, in_features)
    if scheme is None:
        kind = OneDnnExpertStack if can_pack(dtype, device) else DenseExpertStack
        return kind(*shape, dtype, device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        if not many_tokens and PackedInt8ExpertStack.supports(in_features, scheme):
            return PackedInt8ExpertStack(*shape, dtype, device, scheme)
        if not many_tokens and PackedInt4ExpertStack.supports(out_features, in_features, scheme):
            return PackedInt4ExpertStack(*shape, dtype, device, scheme)
        if ExpandedExpertStack.supports(in_features, scheme):
            return ExpandedExpertStack(*shape, dtype, device, scheme)
    if device.type == "cuda":
        return PackedExpertStack(*shape, dtype, device, scheme)
    return QuantizedExpertStack(*shape, dtype, device, scheme)


class OneDnnExpertStack(ExpertStack):
    """Unquantized fp32 or bf16 matrices, each in oneDNN's layout."""

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(num_experts, out_features, in_features, dtype)
        self._weights: list[Tensor | None] = [None] * num_experts

    @property
    def scheme(self) -> None:
        """Unquantized."""
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes held in memory."""
        return self.num_experts * self.out_features * self.in_features * self.dtype.itemsize

    def set_weight(self, expert: int, weight: Tensor) -> None:
        """Cast to the activation dtype and pack."""
        self._weights[expert] = pack(weight.to(self.dtype))

    def dequantized(self, expert: int) -> Tensor:
        """float32 [N, K]."""
        return self._weight(expert).to_dense().float()

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N]."""
        return packed_linear(x, self._weight(expert), bias)

    def _weight(self, expert: int) -> Tensor:
        weight = self._weights[expert]
        if weight is None:
            raise RuntimeError(f"expert {expert} was never set")
        return weight


class ExpandedExpertStack(QuantizedExpertStack):
    """Canonical codes, expanded to bf16 for each use; int4 by one table look-up per byte."""

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: QuantScheme,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, dtype, device, scheme)
        self._code_pairs = _code_pair_table()

    @staticmethod
    def supports(in_features: int, scheme: QuantScheme) -> bool:
        """Whole bytes per row and whole groups."""
        return in_features % 2 == 0 and in_features % (scheme.group_size or 1) == 0

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N]. Per channel, the scale multiplies the product, which spares a pass over the matrix."""
        codes = self._expand(expert)
        scales = self.scales[expert]
        if scales.shape[1] == 1:
            return functional.linear(x, codes).mul_(scales[:, 0]).add_(bias)
        weight = codes.view(self.out_features, scales.shape[1], -1).mul_(scales.unsqueeze(-1))
        return functional.linear(x, weight.view(self.out_features, self.in_features), bias)

    def _expand(self, expert: int) -> Tensor:
        """bfloat16 [N, K]: the codes as numbers."""
        codes = self.codes[expert]
        if self.scheme.bits == 8:
            return codes.to(torch.bfloat16)
        pairs = self._code_pairs.index_select(0, codes.view(-1).to(torch.int32))
        return pairs.view(torch.bfloat16).view(self.out_features, self.in_features)


class PackedInt8ExpertStack(QuantizedExpertStack):
    """int8, one scale per output channel, on torch's kernel; the canonical layout is the kernel's."""

    @staticmethod
    def supports(in_features: int, scheme: QuantScheme) -> bool:
        """The bf16 kernel crashes the process unless K is a multiple of 16."""
        return scheme.bits == 8 and scheme.group_size is None and in_features % 16 == 0

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N]."""
        return torch._weight_int8pack_mm(x, self.codes[expert], self.scales[expert, :, 0]).add_(bias)


class PackedInt4ExpertStack(QuantizedExpertStack):
    """int4 on torch's kernel, which wants a second copy of the codes in its own order.

    The kernel knows only groups of 32 to 256 input features; one scale per output channel is the same mathematics as that
    scale repeated for every group. Scales and zero offsets (all 0) are laid out per group as the kernel reads them.
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        scheme: QuantScheme,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, dtype, device, scheme)
        self._kernel_group = scheme.group_size or next(g for g in (256, 128, 64, 32) if in_features % g == 0)
        self._kernel_codes = torch.empty_like(self.codes)
        kernel_scales_shape = (num_experts, in_features // self._kernel_group, out_features, 2)
        self._kernel_scales = torch.zeros(kernel_scales_shape, dtype=dtype, device=device)

    @staticmethod
    def supports(out_features: int, in_features: int, scheme: QuantScheme) -> bool:
        """The kernel wants N in multiples of 16 and whole groups."""
        return scheme.bits == 4 and out_features % 16 == 0 and in_features % (scheme.group_size or 32) == 0

    @property
    def num_bytes(self) -> int:
        """Bytes held in memory, the second copy included."""
        scale_bytes = self._kernel_scales.numel() * self._kernel_scales.element_size()
        return super().num_bytes + self._kernel_codes.numel() + scale_bytes

    def set_quantized(self, expert: int, quantized: QuantizedTensor) -> None:
        """Store in both layouts. Raises ValueError when scheme or shape differ from the stack's."""
        super().set_quantized(expert, quantized)
        nibbles = quantized.unpacked_codes().to(torch.int32) + 8
        self._kernel_codes[expert].copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1))
        self._kernel_scales[expert, :, :, 0].copy_(quantized.scales.t())

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N]."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._kernel_codes[expert], self._kernel_group, self._kernel_scales[expert]
        )
        return product.add_(bias)


def _code_pair_table() -> Tensor:
    """int32[256]: the two bf16 codes of every packed byte, side by side, so that one look-up expands two weights."""
    byte = torch.arange(256)
    pairs = torch.stack([(byte & 15) - 8, (byte >> 4) - 8], dim=-1).to(torch.bfloat16)
    return pairs.view(torch.int32).view(-1)
