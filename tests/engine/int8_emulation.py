"""What `int8_dense` computes on a GPU, in plain torch over the plain model: slow, and written from the definition alone.

The decoder's maps to queries, keys and values and of dense feed-forward layers (the first) and the output projection have
int8 weights, one scale an output channel (largest / 127). Their rows are in int8 too, after the norm, one scale a row
(largest / 127); products are summed exactly and scaled once. Where the norm is folded into the map, the rows are the
standardised ones and the weight holds gamma. Legend: T rows, N outputs, K inputs, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.attention import SelfAttention
from engine.model.layers import DenseFeedForward, LayerNorm, Linear
from engine.model.transformer import DecoderLayer, Transformer


@dataclass(frozen=True, slots=True)
class Int8Dense:
    """rows_int8: whether the int8 maps take int8 rows; the output projection always does. folded: whether the norms are
    folded into the maps behind them. largest_code: less than 127 for coarser ones."""

    rows_int8: bool = True
    folded: bool = True
    largest_code: int = 127


class EmulatedLinear:
    """Takes the place of a Linear. weight [N, K] float; rows_int8: see the header."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rows_int8: bool, largest_code: int, out: torch.dtype) -> None:
        self._codes, self._scales = quantized(weight.float(), largest_code)
        self._bias = None if bias is None else bias.float()
        self._rows_int8 = rows_int8
        self._largest_code = largest_code
        self._out = out

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if not self._rows_int8:
            y = functional.linear(x.float(), self._codes * self._scales[:, None], self._bias)
            return y.to(self._out)
        codes, scales = quantized(x.float(), self._largest_code)
        assert codes.shape[1] * 127 * 127 < 1 << 24  # so far sums of whole numbers are exact in float32
        y = functional.linear(codes, self._codes) * scales[:, None] * self._scales
        return (y if self._bias is None else y + self._bias).to(self._out)


@dataclass(frozen=True, slots=True)
class FloatNorm:
    """Layer norm whose result is float32, not rounded to the activations' dtype; weight and bias None: standardised rows."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: LayerNorm) -> FloatNorm:
        """The same norm."""
        return cls(norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> float32[T, D]."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return functional.layer_norm(x.float(), x.shape[1:], weight, bias, self.eps)


def quantized(x: Tensor, largest_code: int = 127) -> tuple[Tensor, Tensor]:
    """float32[T, K] -> codes (whole numbers in float32) [T, K], scales [T]."""
    largest = x.abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / largest_code, 1.0)
    return torch.round(x / scales[:, None]).clamp(-largest_code, largest_code), scales


def emulate(model: Transformer, options: Int8Dense) -> Transformer:
    """The model with those maps replaced; shares everything else. Its plain linear maps must not be packed."""
    return replace(
        model,
        output_projection=_linear(model.output_projection.weight, None, replace(options, rows_int8=True), out=torch.float32),
        decoder_norm=FloatNorm.of(model.decoder_norm),
        decoder_layers=tuple(_decoder_layer(layer, options) for layer in model.decoder_layers),
    )


def _decoder_layer(layer: DecoderLayer, options: Int8Dense) -> DecoderLayer:
    attention = layer.self_attention
    self_norm, qkv = _behind_norm(layer.self_attention_norm, attention.qkv, options)
    norm, feed_forward = layer.feed_forward_norm, layer.feed_forward
    if isinstance(feed_forward, DenseFeedForward):
        norm, fc1 = _behind_norm(norm, feed_forward.fc1, options)
        feed_forward = DenseFeedForward(fc1, feed_forward.fc2)
    return replace(
        layer,
        self_attention_norm=self_norm,
        self_attention=SelfAttention(qkv, attention.out, attention.num_heads),
        feed_forward_norm=norm,
        feed_forward=feed_forward,
    )


def _behind_norm(norm: LayerNorm, linear: Linear, options: Int8Dense) -> tuple[FloatNorm, EmulatedLinear]:
    weight, bias = linear.weight.float(), linear.bias
    if options.folded:
        shift = weight @ norm.bias.float()
        bias = shift if bias is None else shift + bias.float()
        weight = weight * norm.weight.float()
    taken = FloatNorm(None, None, norm.eps) if options.folded else FloatNorm.of(norm)
    return taken, _linear(weight, bias, options, out=linear.weight.dtype)


def _linear(weight: Tensor, bias: Tensor | None, options: Int8Dense, *, out: torch.dtype) -> EmulatedLinear:
    return EmulatedLinear(weight, bias, rows_int8=options.rows_int8, largest_code=options.largest_code, out=out)
