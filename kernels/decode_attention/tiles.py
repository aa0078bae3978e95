"""Tiles of the decode attention kernels, and the compile-time arguments that follow from them. H heads, Dh head_dim."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kernels.launch import next_power_of_two

MAX_GROUP = 8  # entries of one source slot that a program takes
_DOT_ROWS = 16  # the smallest number of rows of a tensor-core dot
# Plain programs that find room at once (12 on each of 132 multiprocessors): more would only wait in each other's way.
MAX_AHEAD = 1584


class SelfTiles(NamedTuple):
    """Entries of a program, warps that share an entry's positions, positions a thread asks for at once."""

    entries: int
    warps: int
    steps: int


class CrossTiles(NamedTuple):
    """Source positions a step of the loop, and how."""

    positions: int
    num_warps: int
    stages: int


class GroupTiles(NamedTuple):
    """Of the kernels for groups: heads of a program at most (a warp each), positions a step, and registers a thread may
    have (0: the compiler's choice)."""

    heads: int
    positions: int
    max_registers: int = 0


# By head_dim alone, never by R or G: an entry's bits do not depend on its batch.
SELF_TILES = {16: SelfTiles(4, 1, 2), 32: SelfTiles(4, 1, 4), 64: SelfTiles(1, 1, 8), 128: SelfTiles(1, 1, 8)}
CROSS_TILES = {16: CrossTiles(32, 2, 3), 32: CrossTiles(32, 2, 3), 64: CrossTiles(32, 2, 3), 128: CrossTiles(32, 2, 3)}

# The number of heads changes no bit, so it may follow the number of groups: more of them, fewer programs.
SELF_LIST_TILES = {64: GroupTiles(2, 16, 112), 128: GroupTiles(2, 16, 160)}
CROSS_GROUP_TILES = {64: (GroupTiles(4, 32), GroupTiles(8, 32, 128))}
MANY_GROUPS = 128
MAX_TURNS = 32  # groups that a program can look ahead for


def group_programs(num_groups: int, usual_groups: int | None) -> tuple[int, int]:
    """Rows of programs for G groups of which as a rule `usual_groups` are in use (None: all), and the most groups that one
    may have to take: a power of two, so that few kernels have to be compiled."""
    if usual_groups is None or num_groups <= MANY_GROUPS:  # there is room for all
        return num_groups, 1
    wanted = max(1, min(usual_groups, num_groups))
    turns = next_power_of_two(-(-num_groups // wanted))
    if turns > MAX_TURNS:
        return -(-num_groups // MAX_TURNS), MAX_TURNS
    return wanted, turns


def scale_log2(head_dim: int) -> float:
    """Factor that turns q k^T into the exponent of two of a softmax weight."""
    return math.log2(math.e) / math.sqrt(head_dim)


def self_constants(num_heads: int, head_dim: int, dtype: torch.dtype, tiles: SelfTiles) -> dict[str, int]:
    """Compile-time arguments of decode_self_attention_kernel: a thread loads 16 bytes, so a warp 512 / (Dh * size) cells."""
    lanes = tiles.warps * 512 // (head_dim * dtype.itemsize)
    return {
        "H": num_heads,
        "DH": head_dim,
        "BE": tiles.entries,
        "BT": lanes * tiles.steps,
        "LANES": lanes,
        "num_warps": tiles.entries * tiles.warps,
    }


def cross_constants(num_heads: int, head_dim: int, tiles: CrossTiles) -> dict[str, int]:
    """Compile-time arguments of decode_cross_attention_kernel."""
    return {
        "H": num_heads,
        "DH": head_dim,
        "BE": _DOT_ROWS,
        "MOST": MAX_GROUP,
        "BS": tiles.positions,
        "STAGES": tiles.stages,
        "num_warps": tiles.num_warps,
    }


def group_constants(num_heads: int, head_dim: int, tiles: GroupTiles) -> dict[str, int]:
    """Compile-time arguments of both kernels for groups: as many heads a program as divide H, a power of two."""
    heads = math.gcd(num_heads, tiles.heads)
    constants = {"H": num_heads, "DH": head_dim, "HP": heads, "BS": tiles.positions, "num_warps": heads}
    return constants | ({"maxnreg": tiles.max_registers} if tiles.max_registers else {})
