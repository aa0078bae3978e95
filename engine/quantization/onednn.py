"""oneDNN's blocked weight layout on the CPU, for unquantized matrices.

functional.linear reorders a plain bf16 weight on every call, which costs more than the product itself at decode sizes
([768, 256], 16 rows, one core with AMX: 44 us against 21 us). In fp32 the blocked form also adds up every row in the
same order whatever the number of rows, where the plain product (MKL) changes its order: with it a sentence's result does
not depend on its batch mates, to the last bit. bf16 does so up to K = 256; from K = 512 on about one value in 100,000
differs by a rounding between small and large row counts (tried on AMX with 1 to 300 rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LAID_OUT_FOR_ROWS = 32  # a hint to oneDNN; other row counts are right as well


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True where `pack` and `packed_linear` work and pay: fp32 and bf16 weights on a CPU that oneDNN supports."""
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def pack(weight: Tensor) -> Tensor:
    """[N, K] -> the same matrix in oneDNN's layout, opaque but for `to_dense`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAID_OUT_FOR_ROWS)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], packed [N, K], bias [N] -> x W^T + b [T, N]."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output
