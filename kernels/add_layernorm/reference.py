"""Plain torch truth of `add_layernorm` and `add_layernorm_int8`. R rows, D features, k expert outputs a row."""

from __future__ import annotations

import torch

from kernels.quantized_rows import QuantizedRows, quantize_rows


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
    new_residual = _added(residual, delta, expert_ids)
    normed = torch.nn.functional.layer_norm(new_residual.float(), (residual.shape[1],), weight.float(), bias.float(), eps)
    return new_residual, normed.to(residual.dtype)


def add_layernorm_int8_reference(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    expert_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, QuantizedRows]:
    """(new residual, its norm in int8): same contract as `add_layernorm_int8`; returns new tensors."""
    new_residual = _added(residual, delta, expert_ids)
    rows, features = new_residual.double(), (residual.shape[1],)
    normed = torch.nn.functional.layer_norm(
        rows, features, None if weight is None else weight.double(), None if bias is None else bias.double(), eps
    )
    return new_residual, quantize_rows(normed.float())


def _added(residual: torch.Tensor, delta: torch.Tensor | None, expert_ids: torch.Tensor | None) -> torch.Tensor:
    """residual + sum over slots of delta in fp32, in slot order, rounded once."""
    total = residual.float()
    if delta is not None:
        parts = delta.float() if delta.dim() == 3 else delta.float()[:, None]
        if expert_ids is not None:
            parts = torch.where((expert_ids >= 0)[:, :, None], parts, 0.0)
        for slot in range(1, parts.shape[1]):
            parts[:, 0] = parts[:, 0] + parts[:, slot]
        total = total + parts[:, 0]
    return total.to(residual.dtype)
