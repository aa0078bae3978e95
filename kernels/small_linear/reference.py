"""Plain torch truth of `small_linear` and `qkv_linear`. R rows, N output features, K input features."""

from __future__ import annotations

import torch

from kernels.int8_linear import Int8Linear
from kernels.quantized_rows import QuantizedRows
from kernels.small_linear.folded import FoldedLinear

_LARGEST = 65504.0 - 1000.0


def small_linear_reference(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | Int8Linear | FoldedLinear,
    bias: torch.Tensor | None = None,
    *,
    relu: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Same contract as `small_linear`, computed in `dtype` and rounded once at the end, to out_dtype (of x, unless given);
    returns a new tensor. int8 rows are multiplied as the floats that they stand for."""
    rows = x.dequantize(dtype) if isinstance(x, QuantizedRows) else x.to(dtype)
    out_dtype = x.dtype if isinstance(x, torch.Tensor) and out_dtype is None else out_dtype
    if isinstance(weight, FoldedLinear):
        if isinstance(x, torch.Tensor):
            rows = torch.nn.functional.layer_norm(rows, (x.shape[1],), eps=weight.eps)
        bias, weight = weight.bias, weight.weight
    matrix = weight.dequantized(dtype) if isinstance(weight, Int8Linear) else weight.to(dtype)
    y = torch.nn.functional.linear(rows, matrix, None if bias is None else bias.to(dtype))
    y = y.relu() if relu else y
    y = y if residual is None else residual.to(dtype) + y
    return saturated(y.to(out_dtype))


def saturated(y: torch.Tensor) -> torch.Tensor:
    """fp16 infinities become +-64504; everything else passes."""
    return torch.where(y.isinf(), y.sign() * _LARGEST, y) if y.dtype == torch.float16 else y


def qkv_linear_reference(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | Int8Linear | FoldedLinear,
    bias: torch.Tensor | None,
    cells: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `qkv_linear`; returns (queries, cells), both new."""
    y = small_linear_reference(x, weight, bias, dtype=dtype, out_dtype=cells.dtype)
    queries, keys_values = y[:, : y.shape[1] // 3], y[:, y.shape[1] // 3 :]
    cells = cells.clone()
    inside = (rows >= 0) & (rows < cells.shape[0]) & (positions >= 0) & (positions < cells.shape[1])
    written = keys_values[inside].view(-1, *cells.shape[2:])
    cells[rows[inside].long(), positions[inside].long()] = written
    return queries.contiguous(), cells
