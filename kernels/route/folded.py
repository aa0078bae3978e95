"""The router behind a layer norm, over raw rows: norm(x) W^T = (x W'^T - mean s) / deviation + c. D d_model, E experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.row_products import COUNTS, split_in_thirds
from kernels.row_statistics import CHUNK


@dataclass(frozen=True, slots=True)
class FoldedRouter:
    """thirds bf16[3 E, D]: the router's weight times the norm's (`RowProducts`); sums fp32[E]: of each of its rows; shift
    fp32[E]: the router's product with the norm's bias, plus its own. The norm itself: weight, bias [D], eps."""

    thirds: torch.Tensor
    sums: torch.Tensor
    shift: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float


def serves(d_model: int, num_experts: int, dtype: torch.dtype) -> bool:
    """Whether a kernel takes products of rows [T, D] of this dtype: bf16 alone, whose products with three bf16 parts are as
    exact as fp32's."""
    return dtype == torch.bfloat16 and num_experts in COUNTS and d_model % CHUNK == 0 and d_model & (d_model - 1) == 0


def fold_router(
    router_weight: torch.Tensor,
    router_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> FoldedRouter | None:
    """The router [E, D] with the norm in front of it (weight and bias [D]) folded in; None where no kernel serves E, D or
    the rows' dtype, which is the norm's."""
    experts, features = router_weight.shape
    if not serves(features, experts, norm_weight.dtype):
        return None
    thirds = split_in_thirds(router_weight.float() * norm_weight.float())
    sums = thirds.double().view(3, experts, features).sum((0, 2)).float()
    shift = router_weight.double() @ norm_bias.double()
    shift = shift if router_bias is None else shift + router_bias.double()
    return FoldedRouter(thirds, sums, shift.float(), norm_weight, norm_bias, eps)
