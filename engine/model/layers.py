"""Building blocks without attention: affine map, layer norm, feed-forward, sinusoidal positions, fp16 guard.

Legend: T tokens, D d_model, F feed-forward width, N output features, K input features. Plain inference objects, no autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.quantization.onednn import can_pack, pack, packed_linear


class Linear:
    """y = x W^T + b. weight [N, K], bias [N] or None."""

    __slots__ = ("_is_packed", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self._is_packed = False

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if self._is_packed:
            return packed_linear(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Bring the weight into oneDNN's layout where that pays; views of the old weight no longer reach this one."""
        if can_pack(self.weight.dtype, self.weight.device):
            self.weight = pack(self.weight)
            self._is_packed = True


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer norm over the last axis. weight, bias [D]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class DenseFeedForward:
    """fc2(relu(fc1(x))). fc1 [F, D], fc2 [D, F]."""

    fc1: Linear
    fc2: Linear

    def pack(self) -> None:
        """See Linear.pack."""
        self.fc1.pack()
        self.fc2.pack()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.fc2(self.fc1(x).relu_())


def sinusoidal_positions(num_rows: int, d_model: int, pad_token_id: int) -> Tensor:
    """Position table float32[num_rows, D] of fairseq/NLLB: all sines, then all cosines; row `pad_token_id` is zero.

    Row p = [sin(p * f_j), cos(p * f_j)] with f_j = 10000 ** (-j / (D // 2 - 1)); an odd D ends in a zero column.
    """
    half = d_model // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.int64).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(num_rows, dtype=torch.int64).float().unsqueeze(1) * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = functional.pad(table, (0, d_model % 2))
    table[pad_token_id] = 0.0
    return table


def clamp_overflow(x: Tensor) -> Tensor:
    """In fp16, clamp tokens that overflowed to +-(65504 - 1000), as NLLB does after every layer; other dtypes pass.

    NLLB clamps the whole batch as soon as one value of it is infinite; here each token [T, D] decides for itself, so
    that a sentence does not depend on its batch mates.
    """
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return torch.where(x.isinf().any(dim=-1, keepdim=True), x.clamp(-limit, limit), x)
