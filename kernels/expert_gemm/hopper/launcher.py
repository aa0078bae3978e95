"""Launch of the pipelined expert FFN. T tokens, D d_model, F d_ff, k active, P = T * k pairs."""

from __future__ import annotations

from typing import Any

import torch

from kernels.expert_gemm.packing import STRIP, WORDS, PackedExperts
from kernels.expert_gemm.tiles import FfnTiles
from kernels.launch import check, overlap
from kernels.routing import Routing
from kernels.weights_ahead import WeightsAhead

# Steps of each strip that are asked for before the launch: two of the three that a program holds
_STEPS_AHEAD = 2


def check_pipelined(fc1: PackedExperts, dtype: torch.dtype, num_pairs: int, tiles: FfnTiles) -> None:
    """Raise ValueError where the pipelined launch does not serve these weights, activations and tiles."""
    d_model, d_ff, step = fc1.num_inputs, fc1.num_features, 1024 // fc1.bits
    check(
        fc1.bits in (4, 8) and fc1.group_size == 0, "a pipelined launch takes int4 or int8 weights with per-channel scales"
    )
    check(dtype in (torch.bfloat16, torch.float16), f"x is {dtype}; a pipelined launch takes bf16 or fp16")
    check(
        d_ff % tiles.bn1 == 0 and d_model % tiles.bn2 == 0,
        f"d_ff {d_ff} and d_model {d_model} must be multiples of the tiles {tiles.bn1} and {tiles.bn2}",
    )
    check(d_model % step == 0 and d_ff % step == 0, f"d_model {d_model} and d_ff {d_ff} must be multiples of {step}")
    held = max(tiles.stages, tiles.x_stages)
    check(min(d_model, d_ff) // step >= held, f"{held} steps of {step} input features are held; d_model is {d_model}")
    check(tiles.x_stages * step >= 192, f"x_stages {tiles.x_stages} hold too little of x; choose {-(-192 // step)} or more")
    check(num_pairs * max(d_ff, d_model) < 2**31, f"{num_pairs} pairs are too many for 32-bit offsets: split the batch")


def pipelined_constants(d_model: int, d_ff: int, top_k: int, bits: int, tiles: FfnTiles) -> dict[str, Any]:
    """Compile-time arguments and launch options of `expert_ffn_pipelined_kernel`. Its programs wait for each other, so where
    the tiles leave the registers to the compiler, it gets no more of them than `programs_per_sm` programs have."""
    share = 65536 // (32 * tiles.warps * tiles.programs_per_sm) // 8 * 8
    return {
        "maxnreg": tiles.max_registers or min(255, share),
        "D": d_model,
        "F": d_ff,
        "TOP_K": top_k,
        "BITS": bits,
        "BN1": tiles.bn1,
        "BN2": tiles.bn2,
        "BT": tiles.block_tokens,
        "W_STEPS": tiles.stages,
        "X_STEPS": tiles.x_stages,
        "WARPS": tiles.warps,
        "NARROW": tiles.narrow,
        "num_warps": tiles.warps,
        "launch_cooperative_grid": True,
    }


def first_strips(fc1: PackedExperts, tiles: FfnTiles, programs: int, limit: int) -> WeightsAhead | None:
    """The first steps of the strips that `programs` programs begin with, `limit` bytes at most, as if every expert were hit
    and had one tile. Which have more is not known yet; strips of later experts, asked for in vain then, are read a little
    later. None where the limit is below one piece."""
    step = STRIP * WORDS * 4
    experts, strips, steps = fc1.data.shape[:3]
    size = min(_STEPS_AHEAD, steps) * step
    begun = min(programs * (tiles.bn1 // STRIP), experts * strips, limit // size)
    return WeightsAhead(fc1.data, begun, size, steps * step) if begun else None


def launch_pipelined(
    x: torch.Tensor,
    fc1: PackedExperts,
    bias1: torch.Tensor,
    fc2: PackedExperts,
    bias2: torch.Tensor,
    routing: Routing,
    tiles: FfnTiles,
    hidden: torch.Tensor,
    out: torch.Tensor,
    programs: int,
) -> None:
    """Both GEMMs in one cooperative launch of `programs` programs at most (an error, never a hang, if they do not fit)."""
    from kernels.expert_gemm.hopper.kernel import expert_ffn_pipelined_kernel

    d_model, d_ff = fc1.num_inputs, fc1.num_features
    items = routing.tiles.shape[0] * max(d_ff // tiles.bn1, d_model // tiles.bn2)
    expert_ffn_pipelined_kernel[(min(items, programs),)](
        x,
        fc1.data,
        fc1.scales,
        bias1,
        fc2.data,
        fc2.scales,
        bias2,
        routing.gate_weights,
        routing.gather_index,
        routing.tiles,
        routing.num_tiles,
        hidden,
        out,
        routing.sync,
        **pipelined_constants(d_model, d_ff, routing.top_k, fc1.bits, tiles),
        **overlap(x),
    )
