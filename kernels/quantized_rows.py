"""Rows of activations in int8: symmetric, one scale a row, for products int8 x int8 summed in int32. R rows, D features."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.launch import check

SMALLEST = 2.0**-119  # a row whose largest value is below counts as zeros


class QuantizedRows(NamedTuple):
    """codes int8[R, D] in [-127, 127], scales fp32[R]; a row = codes * scale. NaN as scale: the row was not finite."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """(R, D)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self.codes.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The rows [R, D] as floats: codes * scale, computed in `dtype`."""
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """Round float rows [R, D] to the nearest codes (ties to even); a row's largest value gets +-127.

    A row of zeros gets codes 0 and scale 1; so does one whose largest value is below 2^-119, which divided by 127 is no
    normal fp32 number any more. A row that holds a NaN or an infinity gets codes 0 and scale NaN: what is computed from it
    is NaN.
    """
    check(x.dim() == 2 and x.is_floating_point(), f"rows are {x.dtype}{list(x.shape)}; want floats [R, D]")
    rows = x.float()
    largest = rows.abs().amax(dim=1)
    scales = row_scales(largest)
    codes = torch.round(rows / scales[:, None]).clamp_(-127, 127)
    return QuantizedRows(torch.where(scales.isfinite()[:, None], codes, 0.0).to(torch.int8).contiguous(), scales)


def row_scales(largest: torch.Tensor) -> torch.Tensor:
    """fp32[R] from the largest absolute value of each row, fp32[R]."""
    scales = torch.where(largest >= SMALLEST, largest / 127, 1.0)
    return torch.where(largest.isfinite(), scales, torch.nan)


def check_quantized(rows: QuantizedRows, num_features: int) -> None:
    """Raises ValueError unless codes are contiguous int8[R, num_features] and scales contiguous fp32[R] beside them."""
    codes, scales = rows
    check(
        codes.dtype == torch.int8 and codes.dim() == 2 and codes.shape[1] == num_features and codes.is_contiguous(),
        f"codes are {codes.dtype}{list(codes.shape)}; want contiguous int8[R, {num_features}]",
    )
    check(
        scales.dtype == torch.float32 and scales.shape == codes.shape[:1] and scales.is_contiguous(),
        f"scales are {scales.dtype}{list(scales.shape)}; want contiguous float32[{codes.shape[0]}]",
    )
    check(scales.device == codes.device, f"scales are on {scales.device}, codes on {codes.device}; put both on one device")
