"""Compile jobs of the decode attention kernels: the argument types of a real launch, for `kernels.compile_ahead`."""

from __future__ import annotations

from typing import Any

import torch

from kernels.compile_ahead import Job
from kernels.decode_attention.tiles import (
    CROSS_GROUP_TILES,
    CROSS_TILES,
    SELF_LIST_TILES,
    SELF_TILES,
    cross_constants,
    group_constants,
    scale_log2,
    self_constants,
)

_MODULE, _GROUPED = "kernels.decode_attention.kernel", "kernels.decode_attention.grouped"


def decode_attention_jobs(d_model: int, num_heads: int, dtype: torch.dtype) -> list[Job]:
    """Both kernels with the tiles of this head_dim; strides as of a captured step (multiples of 16)."""
    i32, head_dim = torch.int32, d_model // num_heads
    scale = scale_log2(head_dim)
    own = self_constants(num_heads, head_dim, dtype, SELF_TILES[head_dim])
    cross = cross_constants(num_heads, head_dim, CROSS_TILES[head_dim])
    jobs: list[Job] = []
    for ahead in ({"AHEAD": False}, {"AHEAD": True}):
        jobs += [
            (
                _MODULE,
                "decode_self_attention_kernel",
                (dtype, dtype, *(i32,) * 3, dtype, 320, 3072, 65536, 129, scale),
                own | ahead,
            ),
            (
                _MODULE,
                "decode_cross_attention_kernel",
                (dtype, dtype, *(i32,) * 4, dtype, 3072, 65536, scale),
                cross | ahead,
            ),
        ]
    return jobs


def group_jobs(d_model: int, num_heads: int, dtype: torch.dtype) -> list[Job]:
    """The kernels for groups (Hopper, 16 bits) with the tiles of this head_dim, if it has any."""
    i32, head_dim = torch.int32, d_model // num_heads
    scale = scale_log2(head_dim)
    own: tuple[Any, ...] = (dtype, dtype, *(i32,) * 3, dtype, 1024, 352, scale)
    cross: tuple[Any, ...] = (dtype, dtype, *(i32,) * 4, dtype, 1024, 65536, scale, 320)
    jobs: list[Job] = []
    if head_dim in SELF_LIST_TILES:
        jobs.append((_GROUPED, "self_list_kernel", own, group_constants(num_heads, head_dim, SELF_LIST_TILES[head_dim])))
    for tiles in CROSS_GROUP_TILES.get(head_dim, ()):
        constants = group_constants(num_heads, head_dim, tiles) | {"TURNS": 4}
        jobs.append((_GROUPED, "cross_group_kernel", cross, constants))
    return [
        (module, name, types, constants | {"AHEAD": ahead})
        for module, name, types, constants in jobs
        for ahead in (False, True)
    ]
