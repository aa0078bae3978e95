"""Launcher of `add_layernorm`. R rows, D features, k expert outputs a row."""

from __future__ import annotations

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

    residual fp32/bf16/fp16[R, D]; delta None, [R, D], or [R, k, D] (expert outputs, summed in fp32 in slot order:
    the same bits every
    run); expert_ids int32[R, k]: slots with -1 are left out unread. weight, bias [D]; out like residual. The norm is
    taken of the
    rounded residual, in fp32. One launch. Raises ValueError for shapes that do not belong together.
    """
    rows, features = residual.shape
    check(residual.is_contiguous(), "residual must be contiguous: call .contiguous()")
    check(weight.shape == (features,) and bias.shape == (features,), f"weight and bias must be [{features}]")
    slots = 0
    if delta is not None:
        slots = delta.shape[1] if delta.dim() == 3 else 1
        check(
            delta.is_contiguous() and delta.numel() == rows * slots * features,
            f"delta is {tuple(delta.shape)}; want [{rows}, (k,) {features}]",
        )
    check(expert_ids is None or tuple(expert_ids.shape) == (rows, slots), f"expert_ids must be [{rows}, {slots}]")
    out = torch.empty_like(residual) if out is None else out
    if rows == 0:
        return residual, out
    from kernels.add_layernorm.kernel import add_layernorm_kernel

    d_pad = next_power_of_two(features)
    add_layernorm_kernel[(rows,)](
        residual,
        residual if delta is None else delta,
        residual if expert_ids is None else expert_ids,
        weight,
        bias,
        out,
        eps,
        D=features,
        D_PAD=d_pad,
        SLOTS=slots,
        MASKED=expert_ids is not None,
        num_warps=max(1, min(8, d_pad // 256)),
        **overlap(residual),
    )
    return residual, out
