"""Residual add and layer norm against their slow twin, one case at a time (see `kernels.checks`)."""

from __future__ import annotations

import torch

from kernels.add_layernorm import add_layernorm, add_layernorm_reference, add_slots
from kernels.testing import relative_error

LAYERNORM_SIZES = ((1, 32, 0), (3, 100, 1), (5, 256, 2), (2, 1000, 2))


def check_add_layernorm(rows: int, features: int, slots: int, device: torch.device, dtype: torch.dtype) -> float:
    """Larger error of the two results; slots of inactive pairs are NaN. inf where the add alone gives other bits."""
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    residual, weight, bias = draw(rows, features), draw(features), draw(features)
    delta = draw(rows, slots, features) if slots else None
    ids = None
    if delta is not None:
        ids = torch.randint(-1, 3, (rows, slots), generator=generator, device=device, dtype=torch.int32)
        delta[ids < 0] = float("nan")
    truth = add_layernorm_reference(residual, delta, weight, bias, expert_ids=ids)
    out = torch.full_like(residual, float("nan"))
    new, normed = add_layernorm(residual.clone(), delta, weight, bias, expert_ids=ids, out=out)
    if delta is not None and not torch.equal(add_slots(residual.clone(), delta, expert_ids=ids), new):
        return float("inf")
    return max(relative_error(new, truth[0]), relative_error(normed, truth[1]))
