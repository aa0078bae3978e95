"""What goes into and comes out of `head_topk`. R rows, D features, V_pad stored rows of the head, k tokens a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Best first: values fp32[R, k] (log-probabilities), token_ids int32[R, k]; log_sum_exp fp32[R] of a row's logits."""

    values: torch.Tensor
    token_ids: torch.Tensor
    log_sum_exp: torch.Tensor
