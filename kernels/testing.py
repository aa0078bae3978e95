"""Data, comparison and timing shared by the kernel tests and the bench.

T tokens, k active experts, P = T * k pairs, E experts, D d_model, F d_ff, N output features, K input features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from kernels.expert_gemm.packing import PackedExperts, packed_shape, scale_shape
from kernels.route.reference import order_reference
from kernels.routing import Routing


def random_experts(
    num_experts: int,
    num_features: int,
    num_inputs: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> PackedExperts:
    """Packed experts of random codes (random words: padding is not code 0 here, so a kernel that reads it is caught)."""
    device = generator.device
    if bits == 16:
        weight = torch.empty(num_experts, num_features, num_inputs, dtype=dtype, device=device)
        for e in range(num_experts):
            weight[e].normal_(0.0, num_inputs**-0.5, generator=generator)
        return PackedExperts(weight, None, 16, 0, num_features, num_inputs)
    shape = packed_shape(num_experts, num_features, num_inputs, bits)
    data = torch.empty(shape, dtype=torch.int32, device=device)
    for e in range(num_experts):
        data[e].random_(-(2**31), 2**31 - 1, generator=generator)
    scales = torch.rand(
        scale_shape(num_experts, num_features, num_inputs, bits, group_size), generator=generator, device=device
    )
    scales = (scales + 0.5) * (2.0 / (1 << (bits - 1)) * num_inputs**-0.5)
    return PackedExperts(data, scales, bits, group_size, num_features, num_inputs)


def zipf_routing(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    d_model: int,
    block_tokens: int,
    generator: torch.Generator,
    *,
    power: float = 0.8,
    active_fraction: float = 1.0,
    active_experts: int = 0,
) -> Routing:
    """Random routing with expert popularity (rank + 1) ** -power over a random order of experts (power 0: uniform).

    active_experts > 0: only so many experts, each hit as evenly as T * k pairs allow (top-1 only).
    """
    device = generator.device
    popularity = (torch.arange(num_experts, device=device) + 1.0) ** -power
    popularity = popularity[torch.randperm(num_experts, generator=generator, device=device)]
    if active_experts:
        chosen = torch.randperm(num_experts, generator=generator, device=device)[:active_experts]
        ids = chosen[torch.arange(num_tokens, device=device) % active_experts][:, None].int()
    else:
        ids = torch.multinomial(popularity.expand(num_tokens, -1), top_k, generator=generator).int()
    if active_fraction < 1.0:
        ids[torch.rand(num_tokens, generator=generator, device=device) >= active_fraction] = -1
    gates = torch.rand(num_tokens, top_k, generator=generator, device=device)
    return order_reference(ids, gates, num_experts, d_model, block_tokens)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """|out - reference| / |reference| in fp64; NaN anywhere gives NaN, which passes no comparison."""
    difference = torch.linalg.vector_norm(out.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()).clamp_min(1e-30))


def graph_time_us(
    calls: Sequence[Callable[[], object]], *, before: Callable[[], object] | None = None, replays: int = 15
) -> float:
    """Median microseconds of one call: all calls captured in one CUDA graph (so each may have its own cold data), replayed.

    `before` runs once at the head of the graph (zeroing of counters); its cost is spread over the calls.
    """
    torch.cuda.synchronize()  # inputs made on another stream must be there before the side stream reads them
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in (before, *calls):
            if call is not None:
                call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in (before, *calls):
            if call is not None:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return float(statistics.median(times))
