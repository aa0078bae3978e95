"""Plain torch truth of the expert FFN. T tokens, D d_model, F d_ff, E experts, k active, P = T * k pairs."""

from __future__ import annotations

import torch

from kernels.expert_gemm.packing import PackedExperts, unpack
from kernels.routing import Routing


def dequantize_reference(weight: PackedExperts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Float matrices [E, N, K]: code * scale."""
    if weight.bits == 16:
        return weight.data.to(dtype)
    codes, scales = unpack(weight)
    if weight.group_size:
        per_feature = scales.to(dtype).repeat_interleave(weight.group_size, dim=2)[:, :, : weight.num_inputs]
        return codes.to(dtype) * per_feature
    return codes.to(dtype) * scales.to(dtype)[:, :, None]


def expert_gemm_reference(
    x: torch.Tensor,
    weight: PackedExperts,
    bias: torch.Tensor,
    routing: Routing,
    *,
    first: bool,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Same contract as `expert_gemm`, computed in `dtype`; pairs of inactive tokens are 0."""
    num_pairs = routing.gather_index.numel()
    out = torch.zeros(num_pairs, weight.num_features, dtype=dtype, device=x.device)
    offsets = routing.expert_offsets.tolist()
    for e in range(weight.num_experts):
        if offsets[e] == offsets[e + 1]:
            continue
        matrix = dequantize_reference(weight.expert(e), dtype)[0]
        positions = torch.arange(offsets[e], offsets[e + 1], device=x.device)
        pairs = routing.gather_index[positions].long()
        rows = x[pairs // routing.top_k] if first else x[positions]
        y = rows.to(dtype) @ matrix.T + bias[e].to(dtype)
        if first:
            out[positions] = torch.relu(y)
        else:
            out[pairs] = y * routing.gate_weights.reshape(-1)[pairs].to(dtype)[:, None]
    return out


def expert_ffn_reference(
    x: torch.Tensor,
    fc1: PackedExperts,
    bias1: torch.Tensor,
    fc2: PackedExperts,
    bias2: torch.Tensor,
    routing: Routing,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Same contract as `expert_ffn`, computed in `dtype` without rounding between the GEMMs; inactive pairs are 0.
    [T, k, D]."""
    hidden = expert_gemm_reference(x, fc1, bias1, routing, first=True, dtype=dtype)
    y = expert_gemm_reference(hidden, fc2, bias2, routing, first=False, dtype=dtype)
    return y.view(routing.num_tokens, routing.top_k, fc2.num_features)
