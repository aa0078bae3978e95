"""How the gate GEMM of `route` is cut, from shape alone. D d_model, E experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check, next_power_of_two
from kernels.tile_configs import measured_choice

FEW_TOKENS = 16  # up to here one launch does it all


@dataclass(frozen=True, slots=True)
class GateTiles:
    """One program multiplies `tokens` tokens by one of expert_parts parts of the experts over one of `split` parts of D,
    `features` a step (stages: of several steps). More tokens a program read the weights less often; more parts of D give
    more programs, and more partial sums to add (fp32[split, T, E])."""

    tokens: int = 16
    features: int = 128
    split: int = 8
    expert_parts: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        check(self.tokens in (16, 32, 64), f"tokens is {self.tokens}; choose 16, 32 or 64")
        check(
            self.features in (16, 32, 64, 128, 256, 512),
            f"features is {self.features}; choose a power of two from 16 to 512",
        )
        check(1 <= self.split <= 16, f"split is {self.split}; choose 1 to 16")
        check(self.expert_parts in (1, 2, 4, 8), f"expert_parts is {self.expert_parts}; choose 1, 2, 4 or 8")


def default_tiles(d_model: int, num_experts: int) -> GateTiles:
    """Safe on any device: parts of at most 32 experts (eight parts at most), and of D no smaller than 128 features."""
    features = min(128 if num_experts <= 256 else 32, max(16, next_power_of_two(d_model)))
    parts = min(8, max(1, next_power_of_two(num_experts) // 32))
    split = min(8 if parts == 1 else 4, -(-d_model // features))
    return GateTiles(features=features, split=split, expert_parts=parts)


def select_tiles(d_model: int, num_experts: int, device: torch.device) -> GateTiles:
    """The measured choice of this device (configs/<device>/route.json), else `default_tiles`.

    Neither looks at the number of tokens, so a row's bits do not depend on its batch.
    """
    found = measured_choice("route", device, shape={"d": d_model, "e": num_experts}, size=1)
    return default_tiles(d_model, num_experts) if found is None else GateTiles(**found)
