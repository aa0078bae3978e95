"""Launcher of the router. T tokens, D d_model, E experts, k active experts."""

from __future__ import annotations

import torch

from kernels.launch import check, next_power_of_two, overlap
from kernels.routing import Routing, empty_routing
from kernels.tile_configs import measured_choice

_BLOCK = 16  # tokens a program of the gate GEMM


def select_split(d_model: int, num_experts: int, device: torch.device) -> int:
    """Parts into which D is cut: the measured choice of this device (configs/<device>/route.json), else `gate_split`.

    Neither looks at the number of tokens, so a row's bits do not depend on its batch.
    """
    found = measured_choice("route", device, shape={"d": d_model, "e": num_experts}, size=1)
    return gate_split(d_model, num_experts) if found is None else int(found["split"])


def gate_split(d_model: int, num_experts: int) -> int:
    """Safe on any device: one program reads no more than about 64 KB of gate weights."""
    split = 1
    while split < 16 and d_model % (128 * split) == 0 and num_experts * d_model * 4 // split > 65536:
        split *= 2
    return split


def semaphores(max_tokens: int, device: torch.device) -> torch.Tensor:
    """Zeroed int32 buffer that `route` needs between calls; every call leaves it zero. One per stream."""
    return torch.zeros(-(-max_tokens // _BLOCK), dtype=torch.int32, device=device)


def route(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    *,
    top_k: int,
    block_tokens: int,
    semaphores: torch.Tensor,
    router_bias: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    gate_scale: float = 1.0,
    out: Routing | None = None,
    split: int | None = None,
) -> Routing:
    """Choose experts as NLLB-MoE's Top2Router does, and order the pairs by expert.

    x fp32/bf16/fp16[T, D]; router_weight fp32/bf16/fp16[E, D]; router_bias [E]; active bool[T] (False: not routed at all).
    logits = fp32(x) @ fp32(W).T; p = softmax(logits) cast to x's dtype; e1 = argmax(p), e2 = argmax(logits without
    e1), lowest index
    on ties; top-2 gates p_i / max(p_e1 + p_e2, eps), rounded to x's dtype as transformers 4.57.6 does; a top-1 gate is p_e1.
    gate_scale multiplies the gates (NLLB: 1 - moe_token_dropout). block_tokens: pairs a tile (expert_gemm.block_tokens).
    semaphores: from `semaphores()`. split: parts of D (default: select_split). Two launches, no host sync, same bits
    every run. Raises ValueError for shapes it cannot take.
    """
    num_tokens, d_model = x.shape
    num_experts = router_weight.shape[0]
    check(top_k in (1, 2), f"top_k is {top_k}; choose 1 or 2")
    check(num_experts >= top_k, f"{num_experts} experts cannot give top-{top_k}")
    check(router_weight.shape[1] == d_model, f"router_weight is {tuple(router_weight.shape)}; x wants [E, {d_model}]")
    check(x.is_contiguous() and router_weight.is_contiguous(), "x and router_weight must be contiguous: call .contiguous()")
    check(
        semaphores.numel() * _BLOCK >= num_tokens,
        f"semaphores are for {semaphores.numel() * _BLOCK} tokens; x has {num_tokens}",
    )
    routing = out or empty_routing(num_tokens, top_k, num_experts, d_model, block_tokens, x.device)
    check(
        routing.expert_ids.shape == (num_tokens, top_k) and routing.block_tokens == block_tokens,
        "out was made for another shape",
    )
    if num_tokens == 0:
        for buffer in (routing.tokens_per_expert, routing.expert_offsets, routing.num_tiles, routing.sync):
            buffer.zero_()
        return routing
    split = split or select_split(d_model, num_experts, x.device)
    _launch_gate(x, router_weight, router_bias, active, semaphores, routing, gate_scale, split)
    _launch_order(routing)
    return routing


def _launch_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    active: torch.Tensor | None,
    semaphores: torch.Tensor,
    routing: Routing,
    gate_scale: float,
    split: int,
) -> None:
    from kernels.route.kernel import gate_kernel

    num_tokens, d_model = x.shape
    num_experts = weight.shape[0]
    e_pad = max(16, next_power_of_two(num_experts))
    partial = routing.gate_weights
    if split > 1:
        partial = torch.empty((split, num_tokens, e_pad), dtype=torch.float32, device=x.device)
    gate_kernel[(-(-num_tokens // _BLOCK), split)](
        x,
        weight,
        weight if bias is None else bias,
        weight if active is None else active.view(torch.uint8),
        partial,
        semaphores,
        routing.expert_ids,
        routing.gate_weights,
        num_tokens,
        gate_scale,
        D=d_model,
        E=num_experts,
        E_PAD=e_pad,
        TOP_K=routing.top_k,
        BT=_BLOCK,
        KC=min(64, max(16, next_power_of_two(d_model))),
        SPLIT=split,
        HAS_BIAS=bias is not None,
        HAS_ACTIVE=active is not None,
        EPS=torch.finfo(x.dtype).eps,
        num_warps=4 if e_pad <= 32 else 8,
        num_stages=3,
        **overlap(x),
    )


def _launch_order(routing: Routing) -> None:
    from kernels.route.kernel import expert_order_kernel

    pairs = routing.gather_index.numel()
    expert_order_kernel[(routing.num_experts,)](
        routing.expert_ids,
        routing.tokens_per_expert,
        routing.expert_offsets,
        routing.gather_index,
        routing.scatter_index,
        routing.tiles,
        routing.num_tiles,
        routing.sync,
        pairs,
        routing.sync.numel(),
        E=routing.num_experts,
        E_PAD=next_power_of_two(routing.num_experts),
        BLOCK_TOKENS=routing.block_tokens,
        CHUNK=min(2048, max(128, next_power_of_two(pairs))),
        num_warps=4,
        **overlap(routing.expert_ids),
    )
