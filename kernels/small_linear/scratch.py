"""Memory that `small_linear` needs between its launches, allocated once. R rows, N output features, K input features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.launch import check
from kernels.small_linear.tiles import LinearTiles, select_tiles

SPLIT_ROWS = 1024  # a split of K takes at most so many rows a launch, so that its partial sums stay small


@dataclass(frozen=True, slots=True)
class LinearScratch:
    """One per stream: calls of one stream may share it, since each ends before the next begins.

    statistics fp32: mean and 1 / standard deviation of rows; product: a library GEMM's result before its epilogue, in the
    model's dtype; partial fp32: sums of parts of K, or a folded library GEMM's result; semaphores int32: zero before the
    first call, and every call leaves them zero. All flat.
    """

    statistics: torch.Tensor
    product: torch.Tensor
    partial: torch.Tensor
    semaphores: torch.Tensor


def linear_scratch(
    shapes: Iterable[tuple[int, int, bool]], max_rows: int, dtype: torch.dtype, device: torch.device, *, fixed: bool = False
) -> LinearScratch:
    """Enough for these (N, K, whether a norm is folded in) and up to max_rows rows, float or int8 weights, where the shape
    chooses the tiles."""
    product = partial = semaphores = 0
    for n, k, folded in shapes:
        product = max(product, max_rows * n)
        # a choice serves a range of rows and needs most at the range's end; above SPLIT_ROWS the need no longer grows
        for rows in sorted({*range(1, min(max_rows, SPLIT_ROWS) + 1), *range(SPLIT_ROWS, max_rows, 512), max_rows}):
            for bits in (8, dtype.itemsize * 8):
                tiles = select_tiles(n, k, rows, bits, device, norm=folded, fixed=fixed)
                parts, blocks = split_sizes(tiles, n, rows, folded=folded)
                partial, semaphores = max(partial, parts), max(semaphores, blocks)
    return LinearScratch(
        torch.empty(2 * max_rows, dtype=torch.float32, device=device),
        torch.empty(product, dtype=dtype, device=device),
        torch.empty(partial, dtype=torch.float32, device=device),
        torch.zeros(semaphores, dtype=torch.int32, device=device),
    )


def split_sizes(tiles: LinearTiles, num_features: int, rows: int, *, folded: bool) -> tuple[int, int]:
    """Floats of partial sums (of a folded library GEMM: of its product) and semaphores that one call needs."""
    if tiles.library:
        return rows * num_features if folded else 0, 0
    if tiles.split == 1:
        return 0, 0
    rows = min(rows, SPLIT_ROWS)
    return tiles.split * rows * (num_features + 2 * folded), -(-num_features // tiles.bn) * -(-rows // tiles.br)


def buffer(scratch: LinearScratch | None, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The first `numel` elements of a scratch buffer; without scratch a new one (inside a capture: of the graph's pool)."""
    if scratch is None:
        make = torch.zeros if name == "semaphores" else torch.empty
        return make(numel, dtype=dtype, device=device)
    held: torch.Tensor = getattr(scratch, name)
    check(
        held.numel() >= numel and held.dtype == dtype,
        f"scratch.{name} holds {held.numel()} of {held.dtype}; this call needs {numel} of {dtype}: make it with"
        " linear_scratch for this shape, dtype and number of rows",
    )
    return held[:numel]
