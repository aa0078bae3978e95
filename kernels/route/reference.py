"""Plain torch truth of `route`. T tokens, D d_model, E experts, k active experts, P = T * k pairs."""

from __future__ import annotations

import torch

from kernels.routing import Routing, empty_routing


def route_reference(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    *,
    top_k: int,
    block_tokens: int,
    router_bias: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    gate_scale: float = 1.0,
) -> Routing:
    """Same contract as `kernels.route.launcher.route`; undefined entries are 0 here."""
    logits = x.float() @ router_weight.float().T
    if router_bias is not None:
        logits = logits + router_bias.float()
    probs = torch.softmax(logits, dim=-1).to(x.dtype)
    first = torch.argmax(probs, dim=-1)
    p1 = probs.gather(1, first[:, None])[:, 0]
    if top_k == 1:
        ids, gates = first[:, None], p1[:, None]
    else:
        second = torch.argmax(logits.scatter(1, first[:, None], float("-inf")), dim=-1)
        p2 = probs.gather(1, second[:, None])[:, 0]
        total = torch.clamp(p1 + p2, min=torch.finfo(probs.dtype).eps)
        ids, gates = torch.stack((first, second), 1), torch.stack((p1 / total, p2 / total), 1)
    gates = gates.float() * gate_scale
    if active is not None:
        ids = torch.where(active.bool()[:, None], ids, -1)
        gates = torch.where(active.bool()[:, None], gates, 0.0)
    return order_reference(ids.int(), gates, router_weight.shape[0], x.shape[1], block_tokens)


def order_reference(
    expert_ids: torch.Tensor, gate_weights: torch.Tensor, num_experts: int, d_model: int, block_tokens: int
) -> Routing:
    """Stable expert order, offsets and tile list for given choices (expert_ids int[T, k], -1 = inactive)."""
    num_tokens, top_k = expert_ids.shape
    out = empty_routing(num_tokens, top_k, num_experts, d_model, block_tokens, expert_ids.device)
    flat = expert_ids.reshape(-1).long()
    order = torch.argsort(torch.where(flat < 0, num_experts, flat), stable=True)
    counts = torch.bincount(flat[flat >= 0], minlength=num_experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    starts, ends = offsets[:-1].tolist(), offsets[1:].tolist()
    num_active = ends[-1]
    scatter = torch.full_like(flat, -1)
    scatter[order[:num_active]] = torch.arange(num_active, device=flat.device)
    records = [
        (e, position, min(block_tokens, end - position), 0)
        for e, (start, end) in enumerate(zip(starts, ends, strict=True))
        for position in range(start, end, block_tokens)
    ]
    out.expert_ids.copy_(expert_ids)
    out.gate_weights.copy_(gate_weights)
    out.tokens_per_expert.copy_(counts)
    out.expert_offsets.copy_(offsets)
    out.gather_index.copy_(torch.where(torch.arange(flat.numel(), device=flat.device) < num_active, order, 0))
    out.scatter_index.copy_(scatter)
    out.tiles.zero_()
    if records:
        out.tiles[: len(records)] = torch.tensor(records, dtype=torch.int32, device=flat.device)
    out.num_tiles.fill_(len(records))
    out.sync.zero_()
    return out
