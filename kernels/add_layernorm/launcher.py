"""Launchers of `add_layernorm`, `add_layernorm_int8` and `add_slots`. R rows, D features, k expert outputs a row."""

from __future__ import annotations

from typing import Any

import torch

from kernels.launch import check, next_power_of_two, overlap
from kernels.quantized_rows import QuantizedRows, check_quantized
from kernels.row_statistics import RowStatistics


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


def add_layernorm_int8(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    expert_ids: torch.Tensor | None = None,
    out: QuantizedRows | None = None,
) -> QuantizedRows:
    """residual += delta as in `add_layernorm`, then the layer norm of the new residual in int8, rounded once from fp32.

    weight and bias None: rows less their mean, over their standard deviation, for maps that hold a folded norm's weight and
    bias. One launch; rows of zeros and rows that are not finite as in `quantize_rows`, but the codes of the latter are
    anything. Raises ValueError for shapes that do not belong together.
    """
    rows, features = residual.shape
    check((weight is None) == (bias is None), "weight and bias of the norm go together: give both or neither")
    for vector in (weight, bias):
        check(vector is None or vector.shape == (features,), f"weight and bias must be [{features}]")
    slots = _check_operands(residual, delta, expert_ids)
    if out is None:
        codes = torch.empty_like(residual, dtype=torch.int8)
        out = QuantizedRows(codes, torch.empty(rows, dtype=torch.float32, device=residual.device))
    check_quantized(out, features)
    check(out.codes.shape[0] == rows, f"out has {out.codes.shape[0]} rows; want {rows}")
    if rows == 0:
        return out
    from kernels.add_layernorm.kernel import add_layernorm_int8_kernel

    add_layernorm_int8_kernel[(rows,)](
        residual,
        residual if delta is None else delta,
        residual if expert_ids is None else expert_ids,
        residual if weight is None else weight,
        residual if bias is None else bias,
        out.codes,
        out.scales,
        eps,
        AFFINE=weight is not None,
        **norm_constants(features, slots, masked=expert_ids is not None),
        **overlap(residual),
    )
    return out


def add_slots(
    residual: torch.Tensor,
    delta: torch.Tensor,
    *,
    expert_ids: torch.Tensor | None = None,
    statistics: RowStatistics | None = None,
) -> torch.Tensor:
    """residual += delta in place, as in `add_layernorm` and with the same bits, for a reader that takes its norm itself.
    statistics: the new residual's are left there, where D serves them."""
    slots = _check_operands(residual, delta, expert_ids)
    rows, features = residual.shape
    leave = statistics is not None and statistics.serves(rows, features)
    if statistics is not None:
        statistics.valid = leave
    if rows == 0:
        return residual
    from kernels.add_layernorm.kernel import add_slots_kernel

    constants = add_constants(features, slots, masked=expert_ids is not None)
    add_slots_kernel[(rows, -(-features // constants["BLOCK"]))](
        residual,
        delta,
        residual if expert_ids is None else expert_ids,
        statistics.chunks if statistics is not None and leave else residual,
        **constants,
        LEAVE=leave,
        **overlap(residual),
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
