"""The launches behind a linear map. R rows, N output features, K input features."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kernels.int8_linear import Int8Linear
from kernels.launch import check
from kernels.row_products import COUNTS, RowProducts
from kernels.row_statistics import CHUNK
from kernels.small_linear.constants import (
    finish_constants,
    gemm_constants,
    gemv_constants,
    specialized_constants,
    statistics_constants,
)
from kernels.small_linear.folded import FoldedLinear
from kernels.small_linear.scratch import LinearScratch, buffer, split_sizes
from kernels.small_linear.tiles import LinearTiles
from kernels.weights_ahead import WeightsAhead, ahead_constants

Weight = torch.Tensor | Int8Linear | FoldedLinear
OUT, RESIDUAL, QKV = 0, 1, 2  # MODE of the kernels
_IN_LOOP, _GIVEN, _BY_DOTS = 1, 2, 3  # NORM of the kernel: where a row's mean and standard deviation come from
_BY_CHUNKS = 3  # of the specialized one


@dataclass(frozen=True, slots=True)
class Cache:
    """Where keys and values go: cells [rows, positions, 2, D], and int32[R] each."""

    cells: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


def stored_matrix(weight: Weight) -> tuple[torch.Tensor, bool]:
    """What the GEMM streams, [N, K], and whether it is int8 codes."""
    stored = weight.weight if isinstance(weight, FoldedLinear) else weight
    return (stored.codes, True) if isinstance(stored, Int8Linear) else (stored, False)


def launch_library(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: Cache | None,
    scratch: LinearScratch | None,
) -> None:
    """torch's GEMM; a folded one over raw rows leaves fp32, since what the mean takes off may be most of it."""
    matrix, _ = stored_matrix(weight)
    rows, n = x.shape[0], matrix.shape[0]
    if isinstance(weight, FoldedLinear):
        product = buffer(scratch, "partial", rows * n, torch.float32, x.device).view(rows, n)
        if x.dtype == torch.float32:
            x = x - x.mean(dim=1, keepdim=True)  # else the product's own rounding would grow with the mean
        if x.dtype == torch.float32 or x.device.type == "cpu":  # torch has no mixed product on the CPU
            torch.mm(x.float(), matrix.float().T, out=product)
        else:
            torch.mm(x, matrix.T, out_dtype=torch.float32, out=product)
        _launch_finish(product, x, weight, relu, mode, result, cache)
        return
    product = result
    if mode != OUT:
        product = buffer(scratch, "product", rows * n, x.dtype, x.device).view(rows, n)
    if bias is None:
        torch.mm(x, matrix.T, out=product)
    elif mode == OUT and relu and x.dtype == torch.bfloat16:
        # the GEMM's own epilogue takes the ReLU: one pass over [R, N] less (fp16 has values to clamp as well)
        torch._addmm_activation(bias, x, matrix.T, use_gelu=False, out=product)
        return
    else:
        torch.addmm(bias, x, matrix.T, out=product)
    if mode != OUT or relu or x.dtype == torch.float16:
        _launch_finish(product, x, None, relu, mode, result, cache)


def launch_statistics(x: torch.Tensor, eps: float, statistics: torch.Tensor) -> None:
    """Mean and 1 / standard deviation of every row into statistics fp32[R, 2]."""
    from kernels.small_linear.finish import row_statistics_kernel

    row_statistics_kernel[(x.shape[0],)](x, statistics, eps, **statistics_constants(x.shape[1], hopper=is_hopper(x.device)))


@functools.cache
def major(device: torch.device) -> int:
    """Of the compute capability; 0 without a GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.0 or later."""
    return major(device) >= 9


def launch_gemm(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    statistics: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: Cache | None,
    tiles: LinearTiles,
    scratch: LinearScratch | None,
) -> None:
    """One launch with these tiles: product, norm, bias, ReLU, target. statistics: of the rows, where a launch found them."""
    from kernels.small_linear.gemv import gemv_kernel
    from kernels.small_linear.kernel import small_linear_kernel

    (n, k), rows = weight.shape, x.shape[0]
    folded = weight if isinstance(weight, FoldedLinear) else None
    stored = weight.weight if isinstance(weight, FoldedLinear) else weight
    matrix, is_int8 = stored_matrix(weight)
    bias = bias if folded is None else folded.bias
    operands = (
        x,
        matrix,
        stored.scales if isinstance(stored, Int8Linear) else matrix,
        matrix if bias is None else bias,
        matrix if folded is None else folded.column_sums,
    )
    target = (
        result,
        result if cache is None else cache.cells,
        result if cache is None else cache.rows,
        result if cache is None else cache.positions,
    )
    sizes = (
        rows,
        0 if cache is None else cache.cells.shape[0],
        0 if cache is None else cache.cells.shape[1],
        0.0 if folded is None else folded.eps,
    )
    grid = (-(-rows // tiles.br), -(-n // tiles.bn), tiles.split)
    what: dict[str, Any] = {
        "int8": is_int8,
        "bias": bias is not None,
        "relu": relu,
        "mode": mode,
        "hopper": is_hopper(x.device),
    }
    if tiles.no_dot:
        constants = gemv_constants(n, k, tiles, norm=folded is not None, **what)
        gemv_kernel[grid](*operands, *target, *sizes, **constants)
        return
    floats, blocks = split_sizes(tiles, n, rows, folded=folded is not None)
    partial = semaphores = result
    if tiles.split > 1:
        partial = buffer(scratch, "partial", floats, torch.float32, x.device)
        semaphores = buffer(scratch, "semaphores", blocks, torch.int32, x.device)
    in_loop = _BY_DOTS if tiles.gram and x.dtype != torch.float32 else _IN_LOOP
    norm = 0 if folded is None else in_loop if statistics is None else _GIVEN
    aligned = x.dtype != torch.float32 and k * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    constants = gemm_constants(n, k, tiles, norm=norm, aligned=aligned, **what)
    known = matrix if statistics is None else statistics
    small_linear_kernel[grid](*operands, known, *target, partial, semaphores, *sizes, **constants)


def check_specialized(x: torch.Tensor, weight: Weight, mode: int, tiles: LinearTiles) -> None:
    """Raise ValueError where specialized tiles do not serve these operands; x: rows, or their codes."""
    (n, k), (matrix, _) = weight.shape, stored_matrix(weight)
    check(
        x.dtype != torch.float32 and matrix.dtype == x.dtype and major(x.device) == 9,
        "specialized tiles need bf16 or fp16 rows and weights on compute capability 9.x, or both in int8: choose others",
    )
    features = n // 3 if mode == QKV else n
    check(
        features % tiles.bn == 0 and k % tiles.bk == 0,
        f"specialized tiles of {tiles.bn} features and {tiles.bk} inputs do not divide {features} and {k}: choose others",
    )
    check(
        x.data_ptr() % 16 == 0 and matrix.data_ptr() % 16 == 0,
        "specialized tiles need x and weights at addresses that are multiples of 16: choose others",
    )


def launch_specialized(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    statistics: torch.Tensor | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: Cache | None,
    tiles: LinearTiles,
    row_scales: torch.Tensor | None = None,
    leave: torch.Tensor | None = None,
    products: RowProducts | None = None,
    ahead: WeightsAhead | None = None,
) -> None:
    """As `launch_gemm`, by the kernel with a loading warp. statistics [R, 2], or of chunks [R, 2, K / 64];
    row_scales: of int8 rows x, which have their norm behind them; leave: where statistics of the result's chunks go;
    products: with what the result's rows are multiplied besides, and where that goes; ahead: what to ask for in L2."""
    from kernels.small_linear.specialized import specialized_linear_kernel

    (n, k), rows = weight.shape, x.shape[0]
    folded = weight if isinstance(weight, FoldedLinear) else None
    stored = weight if folded is None else folded.weight
    matrix, _ = stored_matrix(weight)
    bias = bias if folded is None else folded.bias
    folded = folded if row_scales is None else None
    scales = stored.scales if isinstance(stored, Int8Linear) else matrix
    norm = 0 if folded is None else _IN_LOOP if statistics is None else _GIVEN if statistics.dim() == 2 else _BY_CHUNKS
    what: dict[str, Any] = {"bias": bias is not None, "relu": relu, "mode": mode, "leave": leave is not None}
    what |= {"products": 0 if products is None else products.count}
    constants = specialized_constants(n, k, tiles, norm=norm, **what)
    specialized_linear_kernel[(-(-rows // tiles.br), n // tiles.bn)](
        block_descriptor(x, tiles.br, tiles.bk),
        block_descriptor(matrix, tiles.bn, tiles.bk),
        block_descriptor(x, tiles.br, tiles.bk)
        if products is None
        else block_descriptor(products.thirds, products.count, tiles.bn),
        x,
        matrix,
        scales if bias is None else bias,
        scales if folded is None else folded.column_sums,
        scales if statistics is None else statistics,
        scales if leave is None else leave,
        scales,
        scales if row_scales is None else row_scales,
        result,
        result if cache is None else cache.cells,
        result if cache is None else cache.rows,
        result if cache is None else cache.positions,
        scales if products is None else products.allocate(rows),
        matrix if ahead is None else ahead.weights,
        rows,
        0 if cache is None else cache.cells.shape[0],
        0 if cache is None else cache.cells.shape[1],
        0.0 if folded is None else folded.eps,
        **constants,
        **ahead_constants(ahead),
    )


def serves_products(x: torch.Tensor, tiles: LinearTiles, products: RowProducts) -> bool:
    """Whether specialized tiles that leave statistics can multiply their result's rows besides."""
    return x.dtype == torch.bfloat16 and tiles.bn == CHUNK and tiles.br >= 64 and products.count in COUNTS


def block_descriptor(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """How the copy engine reads blocks [rows, columns] of a matrix in 16 bits or int8, and how they lie in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, int8
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [rows, columns]
    dtype = {torch.bfloat16: bfloat16, torch.float16: float16, torch.int8: int8}[matrix.dtype]
    layout = NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(matrix, block, layout)


def _launch_finish(
    product: torch.Tensor,
    x: torch.Tensor,
    folded: FoldedLinear | None,
    relu: bool,
    mode: int,
    result: torch.Tensor,
    cache: Cache | None,
) -> None:
    from kernels.small_linear.finish import finish_linear_kernel

    rows, n = product.shape
    constants = finish_constants(n, x.shape[1], norm=folded is not None, relu=relu, mode=mode, hopper=is_hopper(x.device))
    finish_linear_kernel[(rows, -(-n // constants["BLOCK"]))](
        product,
        x,
        product if folded is None else folded.column_sums,
        product if folded is None else folded.bias,
        result,
        result if cache is None else cache.cells,
        result if cache is None else cache.rows,
        result if cache is None else cache.positions,
        rows,
        0 if cache is None else cache.cells.shape[0],
        0 if cache is None else cache.cells.shape[1],
        0.0 if folded is None else folded.eps,
        **constants,
    )
