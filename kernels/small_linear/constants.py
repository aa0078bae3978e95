"""Compile-time arguments and launch options of the small linear kernels. R rows, N output features, K input features."""

from __future__ import annotations

from typing import Any

from kernels.launch import next_power_of_two, overlap_options
from kernels.small_linear.tiles import LinearTiles


def gemm_constants(
    n: int,
    k: int,
    tiles: LinearTiles,
    *,
    int8: bool,
    bias: bool,
    norm: int,
    relu: bool,
    mode: int,
    hopper: bool,
    aligned: bool,
) -> dict[str, Any]:
    """For `small_linear_kernel`. norm: its NORM, 0 to 2; hopper: compute capability 9.0 or later; aligned: the weights' rows
    are whole pieces of 16 bytes at addresses that are multiples of 16, as the copy engine takes them."""
    return {
        "N": n,
        "K": k,
        "BN": tiles.bn,
        "BK": tiles.bk,
        "BR": tiles.br,
        "SPLIT": tiles.split,
        "STAGES": tiles.stages,
        "INT8": int8,
        "BIAS": bias,
        "NORM": norm,
        "RELU": relu,
        "MODE": mode,
        "PREFETCH": tiles.prefetch and hopper and aligned,
        "num_warps": tiles.warps,
    } | overlap_options(tiles.overlap and hopper)


def specialized_constants(
    n: int,
    k: int,
    tiles: LinearTiles,
    *,
    bias: bool,
    norm: int,
    relu: bool,
    mode: int,
    leave: bool = False,
    products: int = 0,
) -> dict[str, Any]:
    """For `specialized_linear_kernel`; norm: its NORM, 0 to 3; leave: its LEAVE; products: its E. Registers are shared out
    anew within a program: 104 a thread are 168 and more for those that multiply. A program that takes few leaves room beside
    it for attention's, which may start before it is over (a step of 320 rows: 1,098 -> 1,089 us); what would spill gets 128,
    and 168 where more than 64 sums a thread do not even compile with fewer."""
    wide = tiles.bn * tiles.br > 1024 * tiles.warps
    many = tiles.bn == 256 or tiles.br == 128 or (wide and mode == 1) or (norm == 1 and tiles.br >= 64)
    return {
        "E": products,
        "N": n,
        "K": k,
        "BN": tiles.bn,
        "BK": tiles.bk,
        "BR": tiles.br,
        "STAGES": min(tiles.stages, k // tiles.bk),
        "BIAS": bias,
        "NORM": norm,
        "RELU": relu,
        "MODE": mode,
        "LEAVE": leave,
        "PREFETCH": tiles.prefetch,
        "WARPS": tiles.warps,
        "num_warps": tiles.warps,
        "maxnreg": 168 if tiles.bn * tiles.br > 2048 * tiles.warps else 128 if many else 104,
    } | overlap_options(tiles.overlap)


def int8_rows_constants(
    n: int, k: int, tiles: LinearTiles, *, bias: bool, relu: bool, mode: int, integer: bool, hopper: bool
) -> dict[str, Any]:
    """For `int8_rows_kernel`; integer: not on compute capability 7.x; hopper: 9.0 or later."""
    return {
        "N": n,
        "K": k,
        "BN": tiles.bn,
        "BK": tiles.bk,
        "BR": tiles.br,
        "STAGES": tiles.stages,
        "BIAS": bias,
        "RELU": relu,
        "MODE": mode,
        "INTEGER": integer,
        "num_warps": tiles.warps,
    } | overlap_options(tiles.overlap and hopper)


def gemv_constants(
    n: int, k: int, tiles: LinearTiles, *, int8: bool, bias: bool, norm: bool, relu: bool, mode: int, hopper: bool
) -> dict[str, Any]:
    """For `gemv_kernel`."""
    return {
        "N": n,
        "K": k,
        "K_PAD": next_power_of_two(k),
        "BN": tiles.bn,
        "BR": tiles.br,
        "INT8": int8,
        "BIAS": bias,
        "NORM": norm,
        "RELU": relu,
        "MODE": mode,
        "num_warps": tiles.warps,
    } | overlap_options(tiles.overlap and hopper)


def finish_constants(n: int, k: int, *, norm: bool, relu: bool, mode: int, hopper: bool) -> dict[str, Any]:
    """For `finish_linear_kernel`; K matters only to a norm."""
    block, k_pad = min(1024, next_power_of_two(n)), next_power_of_two(k) if norm else 1
    sizes = {"N": n, "K": k if norm else 1, "K_PAD": k_pad, "BLOCK": block}
    flags = {"NORM": norm, "RELU": relu, "MODE": mode, "num_warps": min(8, max(1, max(block, k_pad) // 256))}
    return sizes | flags | overlap_options(hopper)


def statistics_constants(k: int, *, hopper: bool) -> dict[str, Any]:
    """For `row_statistics_kernel`."""
    k_pad = next_power_of_two(k)
    return {"K": k, "K_PAD": k_pad, "num_warps": max(1, min(8, k_pad // 256))} | overlap_options(hopper)
