"""A layer norm folded into the linear map behind it. N output features, K input features.

norm(x) W^T + b = rstd * (x W'^T - mean * s) + c with W' = W * gamma, s[n] = sum of W'[n], c = W beta + b: the GEMM reads raw
rows, and a row's mean and standard deviation are needed only when its sums are done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.launch import check


@dataclass(frozen=True, slots=True)
class FoldedLinear:
    """weight [N, K], or int8: W' as stored; column_sums fp32[N]: s of the stored W'; bias fp32[N]: c; eps of the norm."""

    weight: torch.Tensor | Int8Linear
    column_sums: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __post_init__(self) -> None:
        for name, vector in (("column_sums", self.column_sums), ("bias", self.bias)):
            check(
                vector.dtype == torch.float32 and vector.shape == self.weight.shape[:1] and vector.is_contiguous(),
                f"{name} is {vector.dtype}{list(vector.shape)}; want contiguous float32[{self.weight.shape[0]}]",
            )

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.weight.shape


def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    *,
    int8: bool = False,
) -> FoldedLinear:
    """Fold a layer norm (gamma, beta [K]) into the map [N, K] behind it: W' is rounded to the weight's dtype, or quantized.

    Without folding the normed rows are rounded, with it W' is: 16-bit results are as exact or better. In fp16 digits are
    lost where |W gamma| < 6e-5 (below 3e-8 it is zero), and above 65504 it is refused; bf16 has fp32's range. In int8 a few
    inputs with a large gamma set the step of every channel: against quantizing W, the error grows by 1.1 when gamma is
    1 +- 0.2, by 1.2 at 1 +- 0.3, and threefold when three of 1024 gammas are 8 times the others.
    Raises ValueError for shapes that do not belong together and for W' that is not finite.
    """
    n, k = weight.shape
    check(
        norm_weight.shape == (k,) and norm_bias.shape == (k,),
        f"norm weight and bias are {list(norm_weight.shape)} and {list(norm_bias.shape)}; want [{k}]",
    )
    check(bias is None or bias.shape == (n,), f"bias is {None if bias is None else list(bias.shape)}; want [{n}]")
    product = weight.float() * norm_weight.float()
    folded: torch.Tensor | Int8Linear = quantize_int8(product) if int8 else product.to(weight.dtype)
    stored = folded.dequantized() if isinstance(folded, Int8Linear) else folded
    check(
        bool((product.isfinite() & stored.isfinite()).all()),
        f"weight * norm weight is not finite in {'int8' if int8 else weight.dtype}: use bfloat16 or float32",
    )
    shift = weight.float() @ norm_bias.float()
    return FoldedLinear(
        folded.contiguous() if isinstance(folded, torch.Tensor) else folded,
        stored.sum(1, dtype=torch.float64).float(),
        shift if bias is None else shift + bias.float(),
        eps,
    )
