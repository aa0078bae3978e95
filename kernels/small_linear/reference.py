"""Plain torch truth of `small_linear` and `qkv_linear`. R rows, N output features, K input features."""

from __future__ import annotations

import torch

from kernels.small_linear.folded import FoldedLinear
from kernels.small_linear.int8 import Int8Linear

_LARGEST = 65504.0 - 1000.0


def small_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Linear | FoldedLinear,
    bias: torch.Tensor | None = None,
    *,
    relu: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Same contract as `small_linear`, computed in `dtype` and rounded once at the end; returns a new tensor."""
    rows = x.to(dtype)
    if isinstance(weight, FoldedLinear):
        rows = torch.nn.functional.layer_norm(rows, (x.shape[1],), eps=weight.eps)
        bias, weight = weight.bias, weight.weight
    matrix = weight.dequantized(dtype) if isinstance(weight, Int8Linear) else weight.to(dtype)
    y = torch.nn.functional.linear(rows, matrix, None if bias is None else bias.to(dtype))
    y = y.relu() if relu else y
    y = y if residual is None else residual.to(dtype) + y
    return saturated(y.to(x.dtype))


def saturated(y: torch.Tensor) -> torch.Tensor:
    """fp16 infinities become +-64504; everything else passes."""
    return torch.where(y.isinf(), y.sign() * _LARGEST, y) if y.dtype == torch.float16 else y


def qkv_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Linear | FoldedLinear,
    bias: torch.Tensor | None,
    cells: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `qkv_linear`; returns (queries, cells), both new."""
    y = small_linear_reference(x, weight, bias, dtype=dtype)
    queries, keys_values = y[:, : y.shape[1] // 3], y[:, y.shape[1] // 3 :]
    cells = cells.clone()
    inside = (rows >= 0) & (rows < cells.shape[0]) & (positions >= 0) & (positions < cells.shape[1])
    written = keys_values[inside].view(-1, *cells.shape[2:])
    cells[rows[inside].long(), positions[inside].long()] = written
    return queries.contiguous(), cells
