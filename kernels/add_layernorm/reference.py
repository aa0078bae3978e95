"""Plain torch truth of `add_layernorm`. R rows, D features, k expert outputs a row."""

from __future__ import annotations

import torch


def add_layernorm_reference(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    expert_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `add_layernorm`; returns new tensors."""
    total = residual.float()
    if delta is not None:
        parts = delta.float() if delta.dim() == 3 else delta.float()[:, None]
        if expert_ids is not None:
            parts = torch.where((expert_ids >= 0)[:, :, None], parts, 0.0)
        for slot in range(1, parts.shape[1]):
            parts[:, 0] = parts[:, 0] + parts[:, slot]
        total = total + parts[:, 0]
    new_residual = total.to(residual.dtype)
    normed = torch.nn.functional.layer_norm(new_residual.float(), (residual.shape[1],), weight.float(), bias.float(), eps)
    return new_residual, normed.to(residual.dtype)
