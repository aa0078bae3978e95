"""Weights as the kernels want them: norms folded into the maps behind them, experts packed.

Legend: D d_model, F feed-forward width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model.layers import DenseFeedForward, LayerNorm, Linear
from engine.model.mixture_of_experts import MixtureOfExperts
from engine.quantization.packed_experts import packed_experts
from kernels.expert_gemm import PackedExperts
from kernels.route import FoldedRouter, fold_router
from kernels.small_linear import FoldedLinear, Int8Linear, fold_norm


class KernelLinear(NamedTuple):
    """weight [N, K], int8 codes and scales, or either with the layer norm in front of it folded in; bias [N]."""

    weight: Tensor | Int8Linear | FoldedLinear
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class KernelExperts:
    """One sparse layer: router float32 [E, D] of top_k experts, both expert matrices packed, their biases, and the factor on
    all gates.

    folded: the router with the norm in front of it, for rows that the map before has multiplied by it; None where no kernel
    serves it. tokens_per_expert int32[E]: where the router leaves its counts. It counts anyway, to order the pairs; a place
    that outlives the step costs the step nothing.
    """

    router_weight: Tensor
    router_bias: Tensor | None
    top_k: int
    fc1: PackedExperts
    fc1_bias: Tensor
    fc2: PackedExperts
    fc2_bias: Tensor
    gate_scale: float
    tokens_per_expert: Tensor
    folded: FoldedRouter | None = None


@dataclass(frozen=True, slots=True)
class KernelDense:
    """fc2(relu(fc1(x))), where the norm may be folded into fc1."""

    fc1: KernelLinear
    fc2: KernelLinear


def is_int8(linear: KernelLinear) -> bool:
    """Whether the linear map's weights are int8."""
    return stored_matrix(linear).dtype == torch.int8


def stored_matrix(linear: KernelLinear) -> Tensor:
    """What the linear map reads, [N, K]: weights or int8 codes."""
    stored = linear.weight.weight if isinstance(linear.weight, FoldedLinear) else linear.weight
    return stored.codes if isinstance(stored, Int8Linear) else stored


def is_folded(linear: KernelLinear) -> bool:
    """Whether the linear map reads raw rows and takes the norm in front of it itself."""
    return isinstance(linear.weight, FoldedLinear)


def kernel_linear(linear: Linear) -> KernelLinear:
    """The linear map for the kernels; shares the weight."""
    return KernelLinear(linear.weight, linear.bias)


def folded_linear(linear: Linear, norm: LayerNorm, *, int8: bool = False) -> KernelLinear:
    """The linear map with the norm in front of it folded in. It takes the place of the plain weight, whose memory is
    given up: from now on the plain layer raises an error (its weight is a tensor of torch's meta device)."""
    weight = fold_norm(linear.weight, linear.bias, norm.weight, norm.bias, norm.eps, int8=int8)
    linear.weight = linear.weight.to("meta")
    return KernelLinear(weight, None)


def kernel_feed_forward(
    layer: DenseFeedForward | MixtureOfExperts, *, fold: LayerNorm | None = None, int8: bool = False
) -> KernelDense | KernelExperts:
    """The feed-forward layer for the kernels. fold: the norm in front, to be folded into a dense layer's first map, or into
    a copy of a sparse layer's router; int8: that map in int8."""
    if isinstance(layer, DenseFeedForward):
        fc1 = kernel_linear(layer.fc1) if fold is None else folded_linear(layer.fc1, fold, int8=int8)
        return KernelDense(fc1, kernel_linear(layer.fc2))
    device, classifier = layer.fc1_bias.device, layer.router.classifier
    folded = None
    if fold is not None:
        folded = fold_router(classifier.weight, classifier.bias, fold.weight, fold.bias, fold.eps)
    return KernelExperts(
        router_weight=classifier.weight,
        router_bias=classifier.bias,
        top_k=layer.router.top_k,
        fc1=packed_experts(layer.fc1, device),
        fc1_bias=layer.fc1_bias,
        fc2=packed_experts(layer.fc2, device),
        fc2_bias=layer.fc2_bias,
        gate_scale=layer.output_scale,
        tokens_per_expert=layer.tokens_per_expert,
        folded=folded,
    )


def linear_shape(linear: KernelLinear) -> tuple[int, int, bool]:
    """(N, K, whether a norm is folded in)."""
    n, k = linear.weight.shape
    return n, k, is_folded(linear)


def feed_forward_shapes(layer: KernelDense | KernelExperts) -> set[tuple[int, int, bool]]:
    """`linear_shape` of its dense linear maps."""
    return {linear_shape(layer.fc1), linear_shape(layer.fc2)} if isinstance(layer, KernelDense) else set()
