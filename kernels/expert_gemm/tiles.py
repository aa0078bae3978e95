"""Which tiles an expert FFN runs with: from shape alone, so that a step can be captured.

P pairs, E experts, D d_model, F d_ff. Measured choices live in kernels/configs/<device>/expert_gemm.json (written by
kernels.tune); a device without that file gets the safe rule below: two plain launches, nothing that only Hopper has.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.expert_gemm.packing import PackedExperts
from kernels.launch import check
from kernels.tile_configs import measured_choice


@dataclass(frozen=True, slots=True)
class FfnTiles:
    """block_tokens: pairs a tile; 8 take another instruction of Hopper's tensor cores than more do, which gives other bits.
    bn1, bn2: output features a tile of the first / second GEMM. join: weight planes (32 input features each; for 16-bit
    weights 64) that one dot takes. fused: both GEMMs in one launch; the rest holds for it alone.
    split: parts of the second GEMM's K. programs_per_sm: persistent programs; they must all be resident unless `dynamic`.
    prefetch: bring a program's next item into L2. max_registers 0: the compiler's choice.
    narrow: a tile of at most so many pairs multiplies no more lanes than that (0: every tile multiplies block_tokens);
    for the plain and the pipelined launch.
    pipelined: the launch for many tokens on compute capability 9.0 (hopper/kernel.py). Of the fields above it takes
    block_tokens, bn1 and bn2 (16 or 32 features a warp), warps, programs_per_sm and max_registers; stages and x_stages are
    the steps of weights and of activations it holds.
    """

    block_tokens: int
    bn1: int = 64
    bn2: int = 64
    join: int = 1
    warps: int = 4
    stages: int = 3
    fused: bool = False
    split: int = 1
    programs_per_sm: int = 3
    prefetch: bool = False
    dynamic: bool = False
    max_registers: int = 0
    pipelined: bool = False
    x_stages: int = 2
    narrow: int = 0

    def __post_init__(self) -> None:
        check(self.block_tokens in (8, 16, 32, 64, 128, 256), f"block_tokens is {self.block_tokens}; choose 8 to 256")
        check(
            self.bn1 in (64, 128, 256) and self.bn2 in (64, 128, 256), f"bn is {self.bn1}, {self.bn2}; choose 64, 128 or 256"
        )
        check(self.join in (1, 2, 4), f"join is {self.join}; choose 1, 2 or 4")
        check(not (self.dynamic and self.prefetch), "prefetch needs to know the next item: it cannot go with dynamic")
        check(
            self.narrow == 0 or (self.block_tokens >= 32 and self.narrow == self.block_tokens // 2 and not self.fused),
            f"narrow is {self.narrow}; choose 0, or half of {self.block_tokens} pairs from 32 on where not fused",
        )
        if self.pipelined:
            rows = 16 * self.warps
            check(
                {self.bn1, self.bn2} <= {rows, 2 * rows},
                f"bn is {self.bn1}, {self.bn2}; {self.warps} pipelined warps take {rows} or {2 * rows} features",
            )
            check(self.block_tokens >= 32, f"block_tokens is {self.block_tokens}; a pipelined launch takes 32 or more")
            check(
                1 <= self.x_stages <= self.stages and self.stages >= 2,
                f"stages {self.stages}, x_stages {self.x_stages}; a pipelined launch holds 2 steps of weights at least, "
                "and no more of activations: it waits for both by the copies of activations",
            )


def default_tiles(num_pairs: int, num_experts: int, group_size: int) -> FfnTiles:
    """Safe on any device: block_tokens is the smallest tile above the mean pairs per expert."""
    mean = num_pairs / num_experts
    join = 2 if group_size else 1
    if mean > 64:
        return FfnTiles(block_tokens=64, bn1=128, bn2=128, warps=8, join=join, stages=2)  # 3 exceed an L40S's shared memory
    return FfnTiles(block_tokens=16 if mean <= 24 else 32 if mean <= 48 else 64, bn1=64, bn2=64, join=join)


def select_tiles(num_pairs: int, fc1: PackedExperts) -> FfnTiles:
    """Tiles for P pairs over the experts of `fc1` (E, F = its features, D = its inputs) on the device that holds it."""
    shape = {"bits": fc1.bits, "d": fc1.num_inputs, "f": fc1.num_features, "e": fc1.num_experts}
    device = fc1.data.device
    found = measured_choice("expert_gemm", device, shape=shape | {"group": fc1.group_size}, size=num_pairs)
    if found is not None:
        return FfnTiles(**found)  # type: ignore[arg-type]
    found = measured_choice("expert_gemm", device, shape=shape | {"group": 0}, size=num_pairs)
    if found is not None and not found.get("pipelined", False):  # groups bound the planes of a dot; all else holds for them
        return FfnTiles(**found | {"join": 2})  # type: ignore[arg-type]
    return default_tiles(num_pairs, fc1.num_experts, fc1.group_size)


def block_tokens(num_pairs: int, fc1: PackedExperts) -> int:
    """Pairs a tile for this shape: what `route` must cut its tile list into."""
    return select_tiles(num_pairs, fc1).block_tokens
