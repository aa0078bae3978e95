"""The router against its slow twin, one case at a time (see `kernels.checks`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kernels.route import route, route_reference, semaphores
from kernels.route.tiles import GateTiles
from kernels.routing import Routing, empty_routing
from kernels.testing import relative_error

ROUTE_SIZES = ((1, 64, 8, 2), (37, 64, 6, 2), (40, 256, 128, 2), (33, 128, 32, 1), (16, 96, 5, 2), (17, 75, 3, 1))


def check_route(
    num_tokens: int,
    d_model: int,
    num_experts: int,
    top_k: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tiles: GateTiles | None = None,
    fixed: bool = False,
    block_tokens: int = 16,
) -> str:
    """Empty when `route` gives exactly the reference's integers and its gates to rounding; else what differs."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    x = torch.randn(num_tokens, d_model, generator=generator, device=device).to(dtype)
    weight = torch.randn(num_experts, d_model, generator=generator, device=device) * 0.3
    bias = torch.randn(num_experts, generator=generator, device=device)
    active = torch.rand(num_tokens, generator=generator, device=device) > 0.2
    counters = semaphores(num_tokens, device)
    options = {"top_k": top_k, "block_tokens": block_tokens, "router_bias": bias, "active": active, "gate_scale": 0.8}
    truth = route_reference(x, weight, **options)  # type: ignore[arg-type]
    x[~active] = float("nan")
    out = poisoned_routing(num_tokens, top_k, num_experts, d_model, block_tokens, device)
    for _ in range(2):
        route(x, weight, semaphores=counters, tiles=tiles, fixed=fixed, out=out, **options)  # type: ignore[arg-type]
    return "semaphores were left set" if counters.any() else routing_trouble(out, truth, dtype)


def poisoned_routing(*sizes: Any) -> Routing:
    """Buffers of `empty_routing` that hold what no result may be."""
    out = empty_routing(*sizes)
    for field in dataclasses.fields(out):
        buffer = getattr(out, field.name)
        if isinstance(buffer, torch.Tensor):
            buffer.fill_(float("nan") if buffer.is_floating_point() else -7)
    return out


def routing_trouble(out: Routing, truth: Routing, dtype: torch.dtype) -> str:
    """What differs in a routing, past rounding of the gates; entries that are undefined do not count."""
    used, tiles = int(truth.expert_offsets[-1]), int(truth.num_tiles)
    for name in ("expert_ids", "tokens_per_expert", "expert_offsets", "scatter_index", "num_tiles", "sync"):
        if not torch.equal(getattr(out, name), getattr(truth, name)):
            return f"{name} differs"
    if not torch.equal(out.gather_index[:used], truth.gather_index[:used]) or not torch.equal(
        out.tiles[:tiles], truth.tiles[:tiles]
    ):
        return "gather_index or tiles differ"
    error = relative_error(out.gate_weights, truth.gate_weights)
    return "" if error <= max(1e-6, torch.finfo(dtype).eps) or used == 0 else f"gates are off by {error:.1e}"
