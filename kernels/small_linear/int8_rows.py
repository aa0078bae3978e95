"""Launches of a linear map over int8 rows and int8 weights. R rows, N output features, K input features."""

from __future__ import annotations

import torch

from kernels.int8_linear import Int8Linear
from kernels.launch import check
from kernels.quantized_rows import QuantizedRows, check_quantized
from kernels.small_linear.constants import int8_rows_constants
from kernels.small_linear.folded import FoldedLinear
from kernels.small_linear.launches import Cache, Weight, check_specialized, is_hopper, launch_specialized, major
from kernels.small_linear.tiles import LinearTiles
from kernels.weights_ahead import WeightsAhead


def check_int8_rows(x: QuantizedRows, weight: Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Raise ValueError for operands that do not belong together; dtype: of the result."""
    n, k = weight.shape
    check_quantized(x, k)
    check(
        isinstance(_stored(weight), Int8Linear),
        "int8 rows go with int8 weights: pass an Int8Linear, or fold the norm with int8=True",
    )
    check(_stored(weight).codes.is_contiguous(), "weight must be contiguous: call .contiguous()")
    check(bias is None or not isinstance(weight, FoldedLinear), "a folded weight has its bias with it: leave bias=None")
    check(
        bias is None or (bias.shape == (n,) and bias.dtype == dtype and bias.is_contiguous()),
        f"bias is {None if bias is None else (bias.dtype, list(bias.shape))}; want {dtype}[{n}]",
    )


def launch_int8_rows(
    x: QuantizedRows,
    weight: Weight,
    bias: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: Cache | None,
    tiles: LinearTiles,
    ahead: WeightsAhead | None = None,
) -> None:
    """One launch: product, scales, bias, ReLU, target. A folded weight takes rows less their mean over their deviation."""
    check(
        not (tiles.library or tiles.no_dot or tiles.gram or tiles.split > 1 or tiles.bk < 32),
        "int8 rows take tiles of br 16 and bk 32 on, without split, gram or library: choose others",
    )
    if tiles.specialized:
        check_specialized(x.codes, weight, mode, tiles)
        launch_specialized(x.codes, weight, bias, None, relu, mode, result, cache, tiles, x.scales, ahead=ahead)
        return
    from kernels.small_linear.int8_rows_kernel import int8_rows_kernel

    (n, k), rows, stored = weight.shape, x.codes.shape[0], _stored(weight)
    bias = weight.bias if isinstance(weight, FoldedLinear) else bias
    constants = int8_rows_constants(
        n, k, tiles, bias=bias is not None, relu=relu, mode=mode, **_device_options(result.device)
    )
    int8_rows_kernel[(-(-rows // tiles.br), -(-n // tiles.bn))](
        x.codes,
        stored.codes,
        x.scales,
        stored.scales,
        stored.scales if bias is None else bias,
        result,
        result if cache is None else cache.cells,
        result if cache is None else cache.rows,
        result if cache is None else cache.positions,
        rows,
        0 if cache is None else cache.cells.shape[0],
        0 if cache is None else cache.cells.shape[1],
        **constants,
    )


def _device_options(device: torch.device) -> dict[str, bool]:
    return {"integer": major(device) != 7, "hopper": is_hopper(device)}


def _stored(weight: Weight) -> Int8Linear:
    return weight.weight if isinstance(weight, FoldedLinear) else weight  # type: ignore[return-value]  # checked before
