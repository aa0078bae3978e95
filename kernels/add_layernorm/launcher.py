"""Launchers of `add_layernorm` and `add_slots`. R rows, D features, k expert outputs a row."""

from __future__ import annotations

from typing import Any

import torch

from kernels.launch import check, next_power_of_two, overlap


def add_layernorm(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    expert_ids: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual += delta, then layer norm of the new residual; returns (residual, normed), residual updated in place.

    residual fp32/bf16/fp16[R, D]; delta None, [R, D], or [R, k, D] (expert outputs, summed in fp32 in slot order: the same
    bits every run); expert_ids int32[R, k]: slots with -1 are left out, whatever they hold. weight, bias [D]; out like
    residual. The norm is taken of the rounded residual, in fp32. One launch. Raises ValueError for shapes that do not belong
    together.
    """
    rows, features = residual.shape
    check(weight.shape == (features,) and bias.shape == (features,), f"weight and bias must be [{features}]")
    slots = _check_operands(residual, delta, expert_ids)
    out = torch.empty_like(residual) if out is None else out
    if rows == 0:
        return residual, out
    from kernels.add_layernorm.kernel import add_layernorm_kernel

    add_layernorm_kernel[(rows,)](
        residual,
        residual if delta is None else delta,
        residual if expert_ids is None else expert_ids,
        weight,
        bias,
        out,
        eps,
        **norm_constants(features, slots, masked=expert_ids is not None),
        **overlap(residual),
    )
    return residual, out


def add_slots(residual: torch.Tensor, delta: torch.Tensor, *, expert_ids: torch.Tensor | None = None) -> torch.Tensor:
    """residual += delta in place, as in `add_layernorm` and with the same bits, for a reader that takes its norm itself."""
    slots = _check_operands(residual, delta, expert_ids)
    rows, features = residual.shape
    if rows == 0:
        return residual
    from kernels.add_layernorm.kernel import add_slots_kernel

    constants = add_constants(features, slots, masked=expert_ids is not None)
    add_slots_kernel[(rows, -(-features // constants["BLOCK"]))](
        residual, delta, residual if expert_ids is None else expert_ids, **constants, **overlap(residual)
    )
    return residual


def _check_operands(residual: torch.Tensor, delta: torch.Tensor | None, expert_ids: torch.Tensor | None) -> int:
    """The number of slots of delta."""
    rows, features = residual.shape
    check(residual.is_contiguous(), "residual must be contiguous: call .contiguous()")
    slots = 0
    if delta is not None:
        slots = delta.shape[1] if delta.dim() == 3 else 1
        check(
            delta.is_contiguous() and delta.numel() == rows * slots * features,
            f"delta is {tuple(delta.shape)}; want [{rows}, (k,) {features}]",
        )
    check(expert_ids is None or tuple(expert_ids.shape) == (rows, slots), f"expert_ids must be [{rows}, {slots}]")
    return slots


def norm_constants(features: int, slots: int, *, masked: bool) -> dict[str, Any]:
    """Compile-time arguments of `add_layernorm_kernel`."""
    d_pad = next_power_of_two(features)
    return {"D": features, "D_PAD": d_pad, "SLOTS": slots, "MASKED": masked, "num_warps": max(1, min(4, d_pad // 256))}


def add_constants(features: int, slots: int, *, masked: bool) -> dict[str, Any]:
    """Compile-time arguments of `add_slots_kernel`."""
    block = min(1024, next_power_of_two(features))
    return {"D": features, "BLOCK": block, "SLOTS": slots, "MASKED": masked, "num_warps": max(1, block // 256)}
