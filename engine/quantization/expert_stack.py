"""Expert matrices of one sparse layer and one projection: [E, N, K] in several storage forms, one interface.

Legend: E experts, N output features, K input features, A assignments (token, expert) sorted by expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import QuantScheme
from engine.quantization.symmetric import QuantizedTensor, expand_scales, num_groups, quantize, unpack_int4


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """Assignments sorted by expert.

    tokens_per_expert int64[E]. hit: (expert, first assignment, end) of every expert with tokens.
    """

    tokens_per_expert: Tensor
    hit: tuple[tuple[int, int, int], ...]

    @classmethod
    def from_counts(cls, tokens_per_expert: Tensor) -> ExpertGroups:
        """Read the counts back to the host and skip experts without tokens."""
        hit = []
        start = 0
        for expert, count in enumerate(tokens_per_expert.tolist()):
            if count:
                hit.append((expert, start, start + count))
                start += count
        return cls(tokens_per_expert, tuple(hit))


class ExpertStack(ABC):
    """E matrices [N, K] with activations of dtype `dtype`; filled one expert at a time by `set_weight`/`set_quantized`."""

    def __init__(self, num_experts: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        self.num_experts = num_experts
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype

    @property
    @abstractmethod
    def scheme(self) -> QuantScheme | None:
        """How the matrices are stored; None means unquantized."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes held in memory."""

    @abstractmethod
    def set_weight(self, expert: int, weight: Tensor) -> None:
        """Store a float matrix [N, K] as `expert`, quantizing it where the scheme says so."""

    @abstractmethod
    def dequantized(self, expert: int) -> Tensor:
        """float32 [N, K]: the matrix that `expert` stands for."""

    @abstractmethod
    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> x W^T + b [t, N] for one expert. bias [N]."""

    def set_quantized(self, expert: int, quantized: QuantizedTensor) -> None:
        """Store an already quantized matrix. Raises ValueError when scheme or shape differ from the stack's."""
        raise ValueError(f"expert {expert} is {quantized.scheme.name}; this stack holds unquantized {self.dtype}")

    def check_fits(self, expert: int, quantized: QuantizedTensor) -> None:
        """Raise ValueError when a quantized matrix has another scheme or shape than the stack."""
        shape = (self.out_features, self.in_features)
        if quantized.scheme != self.scheme or quantized.shape != shape:
            holds = "unquantized matrices" if self.scheme is None else self.scheme.name
            raise ValueError(
                f"expert {expert} is {quantized.scheme.name} {quantized.shape}; this stack holds {holds} {shape}"
            )

    def quantized(self, expert: int) -> QuantizedTensor:
        """Canonical codes and scales of one expert. Raises ValueError where the stack does not keep them."""
        raise ValueError(f"expert {expert}: this stack keeps no canonical codes")

    def grouped_linear(self, x: Tensor, bias: Tensor, groups: ExpertGroups) -> Tensor:
        """x [A, K] sorted by expert, bias [E, N] -> [A, N]: each assignment through its own expert."""
        outputs = [self.linear(expert, x[start:end], bias[expert]) for expert, start, end in groups.hit]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class DenseExpertStack(ExpertStack):
    """Unquantized: weight [E, N, K] in the activation dtype."""

    def __init__(
        self, num_experts: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(num_experts, out_features, in_features, dtype)
        self.weight = torch.empty((num_experts, out_features, in_features), dtype=dtype, device=device)

    @property
    def scheme(self) -> None:
        """Unquantized."""
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes held in memory."""
        return self.weight.numel() * self.weight.element_size()

    def set_weight(self, expert: int, weight: Tensor) -> None:
        """Copy with a cast to the activation dtype."""
        self.weight[expert].copy_(weight)

    def dequantized(self, expert: int) -> Tensor:
        """float32 [N, K]."""
        return self.weight[expert].float()

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N]."""
        return functional.linear(x, self.weight[expert], bias)


class QuantizedExpertStack(ExpertStack):
    """Canonical codes and scales of all experts; each use dequantizes to the activation dtype. Right everywhere.

    codes int8 [E, N, K] or uint8 [E, N, ceil(K / 2)], scales [E, N, G] in the activation dtype.
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
        super().__init__(num_experts, out_features, in_features, dtype)
        self._scheme = scheme
        width, code_dtype = (in_features, torch.int8) if scheme.bits == 8 else ((in_features + 1) // 2, torch.uint8)
        self.codes = torch.empty((num_experts, out_features, width), dtype=code_dtype, device=device)
        groups = num_groups(scheme, in_features)
        self.scales = torch.empty((num_experts, out_features, groups), dtype=dtype, device=device)

    @property
    def scheme(self) -> QuantScheme:
        """How the matrices are stored."""
        return self._scheme

    @property
    def num_bytes(self) -> int:
        """Bytes held in memory."""
        return self.codes.numel() + self.scales.numel() * self.scales.element_size()

    def set_weight(self, expert: int, weight: Tensor) -> None:
        """Quantize and store."""
        self.set_quantized(expert, quantize(weight, self._scheme))

    def set_quantized(self, expert: int, quantized: QuantizedTensor) -> None:
        """Store. Raises ValueError when scheme or shape differ from the stack's."""
        self.check_fits(expert, quantized)
        self.codes[expert].copy_(quantized.codes)
        self.scales[expert].copy_(quantized.scales)

    def quantized(self, expert: int) -> QuantizedTensor:
        """Canonical codes and scales of one expert."""
        return QuantizedTensor(self.codes[expert], self.scales[expert].half(), self._scheme, self.in_features)

    def dequantized(self, expert: int) -> Tensor:
        """float32 [N, K]."""
        return self._dequantize(expert, torch.float32)

    def linear(self, expert: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [t, K] -> [t, N]."""
        return functional.linear(x, self._dequantize(expert, x.dtype), bias)

    def _dequantize(self, expert: int, dtype: torch.dtype) -> Tensor:
        codes = self.codes[expert]
        if self._scheme.bits == 4:
            codes = unpack_int4(codes, self.in_features)
        return codes.to(dtype).mul_(expand_scales(self.scales[expert].to(dtype), self._scheme, self.in_features))
