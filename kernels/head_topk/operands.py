"""What goes into and comes out of `head_topk`. R rows, D features, V_pad stored rows of the head, k tokens a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Best first: values fp32[R, k] (log-probabilities), token_ids int32[R, k]; log_sum_exp fp32[R] of a row's logits."""

    values: torch.Tensor
    token_ids: torch.Tensor
    log_sum_exp: torch.Tensor


@dataclass(frozen=True, slots=True)
class Int8Head:
    """Head weights codes int8[V_pad, D] with scales fp32[V_pad]: weight[v] = codes[v] * scales[v]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        check(self.codes.dtype == torch.int8 and self.codes.dim() == 2, "codes must be int8[V_pad, D]")
        check(
            self.scales.dtype == torch.float32 and self.scales.shape == self.codes.shape[:1],
            f"scales must be fp32[{self.codes.shape[0]}]: one for each row of codes",
        )

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[V_pad, D] in `dtype`."""
        return (self.codes.to(dtype) * self.scales[:, None].to(dtype)).to(dtype)


def quantize_head(weight: torch.Tensor) -> Int8Head:
    """Symmetric int8 with one scale a row (largest magnitude / 127); weight float[V_pad, D]."""
    scales = (weight.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round(weight.float() / scales[:, None]).clamp(-127, 127).to(torch.int8)
    return Int8Head(codes, scales)
