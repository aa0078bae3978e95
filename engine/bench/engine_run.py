"""One timed run of any engine, and the device's clock."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.types import Int32Array


@dataclass(frozen=True, slots=True)
class EngineRun:
    """token_ids int32[B, target tokens]: best hypotheses. total_s from the first byte to the last token; encode_s by itself.

    scores: of the best hypotheses, as the engine reports them; empty where it reports none.
    """

    token_ids: Int32Array
    total_s: float
    encode_s: float
    num_steps: int
    scores: tuple[float, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of best hypotheses, the forced one included, over the total time."""
        return self.token_ids.size / self.total_s

    @property
    def step_s(self) -> float:
        """One decode step: the total without the encoder pass, over the steps."""
        return max(self.total_s - self.encode_s, 0.0) / self.num_steps


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
