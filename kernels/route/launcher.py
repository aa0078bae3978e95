"""Launcher of the router. T tokens, D d_model, E experts, k active experts."""

from __future__ import annotations

import torch

from kernels.launch import check, overlap
from kernels.route.constants import few_constants, finish_constants, gate_constants, order_constants
from kernels.route.folded import FoldedRouter
from kernels.route.tiles import FEW_TOKENS, GateTiles, select_tiles
from kernels.routing import Routing, empty_routing
from kernels.row_products import RowProducts
from kernels.row_statistics import RowStatistics

_FEWEST_TOKENS_A_BLOCK = 16


def semaphores(max_tokens: int, device: torch.device) -> torch.Tensor:
    """Zeroed int32 buffer that `route` needs between calls; every call leaves it zero. One per stream."""
    return torch.zeros(-(-max_tokens // _FEWEST_TOKENS_A_BLOCK), dtype=torch.int32, device=device)


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
    tiles: GateTiles | None = None,
    fixed: bool = False,
) -> Routing:
    """Choose experts as NLLB-MoE's Top2Router does, and order the pairs by expert.

    x fp32/bf16/fp16[T, D]; router_weight fp32/bf16/fp16[E, D]; router_bias [E]; active bool[T] (False: not routed at all).
    logits = fp32(x) @ fp32(W).T; p = softmax(logits) cast to x's dtype; e1 = argmax(p), e2 = argmax(logits without e1),
    lowest index on ties; top-2 gates p_i / max(p_e1 + p_e2, eps), rounded to x's dtype as transformers 4.57.6 does; a top-1
    gate is p_e1. gate_scale multiplies the gates (NLLB: 1 - moe_token_dropout). block_tokens: pairs a tile
    (expert_gemm.block_tokens). semaphores: from `semaphores()`.

    Up to FEW_TOKENS tokens one launch, else two; no host sync, same bits every run. fixed, or tiles
    given (default: select_tiles): always two, so that a row's bits do not depend on the number of tokens either.
    Raises ValueError for shapes it cannot take.
    """
    num_tokens, d_model = x.shape
    num_experts = router_weight.shape[0]
    check(top_k in (1, 2), f"top_k is {top_k}; choose 1 or 2")
    check(num_experts >= top_k, f"{num_experts} experts cannot give top-{top_k}")
    check(router_weight.shape[1] == d_model, f"router_weight is {tuple(router_weight.shape)}; x wants [E, {d_model}]")
    check(x.is_contiguous() and router_weight.is_contiguous(), "x and router_weight must be contiguous: call .contiguous()")
    capacity = semaphores.numel() * _FEWEST_TOKENS_A_BLOCK
    check(capacity >= num_tokens, f"semaphores are for {capacity} tokens; x has {num_tokens}")
    few = num_tokens <= FEW_TOKENS and not fixed and tiles is None
    routing = _buffers(out, x, num_experts, top_k, block_tokens)
    if num_tokens == 0:
        _route_nobody(routing)
    elif few:
        _launch_few(x, router_weight, router_bias, active, semaphores, routing, gate_scale)
    else:
        tiles = tiles or select_tiles(d_model, num_experts, x.device)
        launch_gate(x, router_weight, router_bias, active, semaphores, routing, gate_scale, tiles)
        _launch_order(routing, semaphores, -(-num_tokens // tiles.tokens))
    return routing


def route_products(
    x: torch.Tensor,
    products: RowProducts,
    statistics: RowStatistics,
    router: FoldedRouter,
    *,
    top_k: int,
    block_tokens: int,
    active: torch.Tensor | None = None,
    gate_scale: float = 1.0,
    out: Routing | None = None,
    normed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routing]:
    """(norm(x) [T, D], what `route` makes of it): both from what the map that wrote x has left, in two launches.

    x bf16[T, D], raw; products (of `router.thirds`) and statistics of x as it is (`products.parts` there,
    `statistics.valid`); router: the norm and the router behind it. Logits are of the norm before its rounding; all else is
    as of `route`. normed: bf16[T, D] to fill. Raises ValueError for operands that do not belong together.
    """
    num_tokens, d_model = x.shape
    parts, experts = products.parts, products.count
    check(top_k in (1, 2), f"top_k is {top_k}; choose 1 or 2")
    check(
        parts is not None and tuple(parts.shape[1:]) == (num_tokens, experts) and products.thirds.shape[1] == d_model,
        f"the products are not those of x {list(x.shape)}: give it to the map that writes x",
    )
    check(statistics.valid and statistics.serves(num_tokens, d_model), "the statistics are not those of x")
    check(router.thirds is products.thirds, "the products are with another router: make them of `router.thirds`")
    check(x.dtype == torch.bfloat16 and x.is_contiguous(), f"x is {x.dtype}{list(x.shape)}; want contiguous bfloat16")
    routing = _buffers(out, x, experts, top_k, block_tokens)
    normed = torch.empty_like(x) if normed is None else normed
    check(
        normed.shape == x.shape and normed.dtype == x.dtype and normed.is_contiguous(),
        f"normed is {normed.dtype}{list(normed.shape)}; want contiguous {x.dtype}{list(x.shape)}",
    )
    if num_tokens == 0:
        _route_nobody(routing)
        return normed, routing
    from kernels.route.finish import finish_route_kernel

    constants = finish_constants(d_model, experts, top_k, x.dtype)
    finish_route_kernel[(-(-num_tokens // constants["ROWS"]),)](
        x,
        statistics.chunks,
        parts,
        router.sums,
        router.shift,
        router.norm_weight,
        router.norm_bias,
        x if active is None else active.view(torch.uint8),
        normed,
        routing.expert_ids,
        routing.gate_weights,
        num_tokens,
        router.eps,
        gate_scale,
        HAS_ACTIVE=active is not None,
        **constants,
        **overlap(x),
    )
    _launch_order(routing, routing.sync, 0)  # no program has waited for another: there are no semaphores to clear
    return normed, routing


def _buffers(out: Routing | None, x: torch.Tensor, num_experts: int, top_k: int, block_tokens: int) -> Routing:
    """`out`, if it is for routing x [T, D] so, or new ones."""
    routing = out or empty_routing(len(x), top_k, num_experts, x.shape[1], block_tokens, x.device)
    check(
        routing.expert_ids.shape == (len(x), top_k) and routing.block_tokens == block_tokens,
        "out was made for another shape",
    )
    return routing


def _route_nobody(routing: Routing) -> None:
    for buffer in (routing.tokens_per_expert, routing.expert_offsets, routing.num_tiles, routing.sync):
        buffer.zero_()


def _launch_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    active: torch.Tensor | None,
    semaphores: torch.Tensor,
    routing: Routing,
    gate_scale: float,
) -> None:
    from kernels.route.few import route_few_kernel

    num_tokens, d_model = x.shape
    constants = few_constants(d_model, weight.shape[0], routing.top_k, routing.block_tokens, x.dtype)
    parts = -(-d_model // constants["KC"])
    route_few_kernel[(parts,)](
        x,
        weight,
        weight if bias is None else bias,
        weight if active is None else active.view(torch.uint8),
        torch.empty(parts * num_tokens * constants["E_PAD"], dtype=torch.float32, device=x.device),
        semaphores,
        routing.expert_ids,
        routing.gate_weights,
        routing.tokens_per_expert,
        routing.expert_offsets,
        routing.gather_index,
        routing.scatter_index,
        routing.tiles,
        routing.num_tiles,
        routing.sync,
        num_tokens,
        routing.sync.numel(),
        gate_scale,
        HAS_BIAS=bias is not None,
        HAS_ACTIVE=active is not None,
        **constants,
        **overlap(x),
    )


def launch_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    active: torch.Tensor | None,
    semaphores: torch.Tensor,
    routing: Routing,
    gate_scale: float,
    tiles: GateTiles,
) -> torch.Tensor:
    """Choices and gates into `routing`; returns the parts of the logits, fp32[split, T, E_PAD]. Leaves the semaphores set:
    `expert_order_kernel` must follow."""
    from kernels.route.kernel import gate_kernel

    num_tokens, d_model = x.shape
    constants = gate_constants(d_model, weight.shape[0], routing.top_k, tiles, x.dtype, on_gpu=x.is_cuda)
    partial = torch.empty((tiles.split, num_tokens, constants["E_PAD"]), dtype=torch.float32, device=x.device)
    programs = -(-num_tokens // tiles.tokens) * tiles.split * tiles.expert_parts - (-num_tokens // constants["CHOOSE"])
    gate_kernel[(programs,)](
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
        HAS_BIAS=bias is not None,
        HAS_ACTIVE=active is not None,
        **constants,
        **overlap(x),
    )
    return partial


def _launch_order(routing: Routing, semaphores: torch.Tensor, blocks: int) -> None:
    from kernels.route.order import expert_order_kernel

    pairs = routing.gather_index.numel()
    expert_order_kernel[(routing.num_experts + 1,)](
        routing.expert_ids,
        routing.tokens_per_expert,
        routing.expert_offsets,
        routing.gather_index,
        routing.scatter_index,
        routing.tiles,
        routing.num_tiles,
        routing.sync,
        semaphores,
        pairs,
        routing.sync.numel(),
        blocks,
        **order_constants(pairs, routing.num_experts, routing.block_tokens),
        **overlap(routing.expert_ids),
    )
