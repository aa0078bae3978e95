"""int8 weights of a linear map or of the output projection: symmetric, one scale per output channel.

N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check
from kernels.quantized_rows import quantize_rows

_CHANNELS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """codes int8[N, K] in [-127, 127], scales fp32[N]; weight = codes * scales."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        check(
            self.codes.dtype == torch.int8 and self.codes.dim() == 2,
            f"codes are {self.codes.dtype}{list(self.codes.shape)}; want int8[N, K]",
        )
        check(
            self.scales.dtype == torch.float32 and self.scales.shape == self.codes.shape[:1],
            f"scales are {self.scales.dtype}{list(self.scales.shape)}; want float32[{self.codes.shape[0]}]",
        )

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.codes.shape

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The float matrix [N, K], computed in `dtype` from codes and scales."""
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]


def quantize_int8(weight: torch.Tensor) -> Int8Linear:
    """Round a float matrix [N, K] as `quantize_rows` rounds rows: a channel's largest value gets +-127, a zero one scale 1.

    Some thousand channels at a time, so that no fp32 copy of a whole output projection is made.
    """
    parts = [quantize_rows(part) for part in torch.split(weight, _CHANNELS_AT_ONCE)]
    return Int8Linear(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))
