"""The anchor of the expert FFN: torch's bf16 grouped_mm with bias and ReLU, each in one pass over the rows.

P pairs in expert order, E experts, D d_model, F d_ff, N features. grouped_mm takes no bias, and eager torch needs a gathered
copy of the biases and three passes; one fused pass is what a careful user of grouped_mm would write.
"""

from __future__ import annotations

import torch

from kernels.launch import next_power_of_two


def add_bias(rows: torch.Tensor, bias: torch.Tensor, experts: torch.Tensor, *, relu: bool) -> torch.Tensor:
    """rows [P, N] += bias[experts] in place, then ReLU if asked; experts int32[P]. Returns rows."""
    from kernels.expert_anchor.kernel import bias_kernel

    num_rows, n = rows.shape
    block = min(2048, next_power_of_two(n))
    bias_kernel[(num_rows, -(-n // block))](rows, bias, experts, N=n, BLOCK=block, RELU=relu, num_warps=4)
    return rows


def grouped_ffn(
    rows: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor] | None,
    offsets: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """relu(rows W1^T + b1) W2^T + b2 of bf16 rows [P, D] in expert order -> [P, D]; no gather, no gate, no scatter.

    weights [E, F, D] and [E, D, F]; biases [E, F] and [E, D], or None: ReLU alone; offsets int32[E]: where each expert's
    rows end; experts int32[P].
    """
    hidden = torch._grouped_mm(rows, weights[0].transpose(1, 2), offs=offsets)
    if biases is None:
        return torch._grouped_mm(hidden.relu_(), weights[1].transpose(1, 2), offs=offsets)
    add_bias(hidden, biases[0], experts, relu=True)
    out = torch._grouped_mm(hidden, weights[1].transpose(1, 2), offs=offsets)
    return add_bias(out, biases[1], experts, relu=False)
