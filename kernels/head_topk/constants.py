"""Compile-time arguments and launch options of the kernels of `head_topk`. D features, V vocabulary, k tokens a row."""

from __future__ import annotations

from typing import Any

from kernels.head_topk.tiles import HeadTiles
from kernels.launch import next_power_of_two

PACK = 8  # chunks of a row whose maxima and sums lie together: 64 bytes
_START_BLOCK = 1024
MAX_PROGRAMS = 256  # of `online` that share a row's tokens: the second launch holds a number for each
_ONLINE_REGISTERS = {2: 240, 3: 168, 4: 128, 5: 96}  # a lane, by groups of 4 warps
_ROW_STAGES = {2: 4, 3: 4, 4: 3, 5: 3}  # of a group's own rows, by groups: each costs all of them shared memory


def chunk_options(tiles: HeadTiles) -> dict[str, int]:
    """Launch options of the first kernel."""
    if tiles.online:
        return {"num_warps": 4, "maxnreg": _ONLINE_REGISTERS[(tiles.block_rows + tiles.extra_rows) // 64]}
    if tiles.specialized:
        return {"num_warps": 4, "maxnreg": 168}  # 12 warps in all, which then share out 3 x 168 registers a lane themselves
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def chunk_constants(
    num_features: int, vocab_size: int, k: int, bits: int, has_banned: bool, tiles: HeadTiles
) -> dict[str, Any]:
    """Compile-time arguments of the first kernel; the tuner and the compile check build the same ones."""
    if tiles.online:
        row_groups = (tiles.block_rows + tiles.extra_rows) // 64
        return {
            "D": num_features,
            "ROW_GROUPS": row_groups,
            "BK": tiles.block_features,
            "X_STAGES": _ROW_STAGES[row_groups],
            "STAGES": tiles.stages,
            "GROUPS": max(8, next_power_of_two(k)),
            "PACK": PACK,
            "HAS_BANNED": has_banned,
            "GATED": tiles.gated,
            "WHOLE": vocab_size % tiles.chunk == 0,
            "REGISTERS": _ONLINE_REGISTERS[row_groups],
        }
    if tiles.specialized:
        return {
            "D": num_features,
            "BV": tiles.block_vocab,
            "BR": tiles.block_rows // 2,
            "BR2": tiles.extra_rows,
            "BK": tiles.block_features,
            "STAGES": tiles.stages,
            "GROUPS": max(8, next_power_of_two(k)),  # as many as the narrowest product has columns
            "PACK": PACK,
            "HAS_BANNED": has_banned,
            "GATED": tiles.gated,
        }
    return {
        "D": num_features,
        "BITS": bits,
        "BV": tiles.block_vocab,
        "BR": tiles.block_rows,
        "BR2": tiles.extra_rows,
        "BK": tiles.block_features,
        "SLICE": tiles.slice_rows,
        "GROUPS": next_power_of_two(k),
        "PACK": PACK,
        "HAS_BANNED": has_banned,
        "GATED": tiles.gated,
        "TMA": tiles.tma,
    }


def start_constants(vocab_size: int, has_banned: bool, tiles: HeadTiles) -> dict[str, Any]:
    """Compile-time arguments and options of `head_start_kernel`."""
    return {
        "BV": tiles.block_vocab,
        "FLAGS": next_power_of_two(-(-vocab_size // tiles.block_vocab)) if tiles.specialized and not tiles.online else 0,
        "BLOCK": _START_BLOCK,
        "HAS_BANNED": has_banned,
        "num_warps": 8,
    }


def merge_constants(k: int, vocab_size: int, bits: int, has_banned: bool, tiles: HeadTiles) -> dict[str, Any]:
    """Compile-time arguments of `head_merge_kernel`."""
    return {
        "BV": tiles.chunk,
        "C_PAD": next_power_of_two(-(-vocab_size // tiles.chunk)),
        "P_PAD": MAX_PROGRAMS if tiles.online else 0,
        "PACK": PACK,
        "LANED": tiles.laned,
        "K": k,
        "K_PAD": next_power_of_two(k),
        "HAS_BANNED": has_banned,
        "SCALED": tiles.online and tiles.gated and bits == 8,
    }
