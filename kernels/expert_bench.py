"""Data, check and timing of the expert FFN, for the tuner and the bench.

T tokens, k active experts, P = T * k pairs, E experts, D d_model, F d_ff.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from kernels.bench_rows import Row
from kernels.cases import ENCODE_TOKENS, FfnShape, Precision
from kernels.expert_gemm import FfnTiles, PackedExperts, expert_ffn, expert_ffn_reference, select_tiles
from kernels.route.reference import order_reference
from kernels.routing import Routing
from kernels.testing import graph_time_us, random_experts, relative_error, zipf_routing

MAX_ERROR = 1e-2  # against fp32: bf16 operands and a bf16 hidden layer give 2e-3 to 5e-3
_DEVICE = "cuda"


@dataclasses.dataclass
class ExpertBed:
    """Weights (several copies, so that they are cold) and biases of one layer."""

    shape: FfnShape
    precision: Precision
    weights: list[tuple[PackedExperts, PackedExperts]]
    bias1: torch.Tensor
    bias2: torch.Tensor

    @classmethod
    def build(cls, shape: FfnShape, precision: Precision) -> ExpertBed:
        """Random weights: about half a gigabyte at least."""
        generator = torch.Generator(_DEVICE).manual_seed(7)
        size = shape.num_experts * shape.d_model * shape.d_ff * 2 * precision.bits // 8

        def make(features: int, inputs: int) -> PackedExperts:
            return random_experts(
                shape.num_experts, features, inputs, precision.bits, precision.group_size, torch.bfloat16, generator
            )

        copies = max(1, min(4, (640 << 20) // size))
        weights = [(make(shape.d_ff, shape.d_model), make(shape.d_model, shape.d_ff)) for _ in range(copies)]
        bias1, bias2 = (
            torch.randn(shape.num_experts, n, device=_DEVICE, generator=generator).bfloat16() * 0.1
            for n in (shape.d_ff, shape.d_model)
        )
        return cls(shape, precision, weights, bias1, bias2)

    def point(self, num_tokens: int, power: float = 0.8, active_experts: int = 0) -> ExpertPoint:
        """Inputs for one token count; power 0 is uniform routing; active_experts > 0 limits (and fills) the experts hit."""
        return ExpertPoint.build(self, num_tokens, power, active_experts)


@dataclasses.dataclass
class ExpertPoint:
    """One token count: inputs and routings of every call in the graph, and the truth for the first."""

    bed: ExpertBed
    num_tokens: int
    xs: list[torch.Tensor]
    choices: list[tuple[torch.Tensor, torch.Tensor]]
    truth: torch.Tensor
    hidden: torch.Tensor
    out: torch.Tensor
    cuts: dict[int, tuple[list[Routing], torch.Tensor]] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(cls, bed: ExpertBed, num_tokens: int, power: float, active_experts: int) -> ExpertPoint:
        """Random inputs and routings, the same for every precision; fewer calls where one call moves gigabytes anyway."""
        shape, generator = bed.shape, torch.Generator(_DEVICE).manual_seed(num_tokens)
        calls = 4 if num_tokens >= 4096 else 8 if shape.num_experts > 64 else 16
        xs = [torch.randn(num_tokens, shape.d_model, device=_DEVICE, generator=generator).bfloat16() for _ in range(calls)]
        routings = []
        for _ in range(calls):
            routing = zipf_routing(
                num_tokens,
                shape.top_k,
                shape.num_experts,
                shape.d_model,
                16,
                generator,
                power=power,
                active_experts=active_experts,
            )
            routings.append(routing)
        fc1, fc2 = bed.weights[0]
        truth = expert_ffn_reference(xs[0], fc1, bed.bias1, fc2, bed.bias2, routings[0])
        pairs = num_tokens * shape.top_k
        hidden = torch.empty(pairs, shape.d_ff, device=_DEVICE, dtype=torch.bfloat16)
        out = torch.empty(num_tokens, shape.top_k, shape.d_model, device=_DEVICE, dtype=torch.bfloat16)
        return cls(bed, num_tokens, xs, [(r.expert_ids, r.gate_weights) for r in routings], truth, hidden, out)

    def cut(self, block_tokens: int) -> tuple[list[Routing], torch.Tensor]:
        """The routings cut to tiles of `block_tokens`, their sync counters in one buffer (rows of a multiple of 256
        bytes)."""
        if block_tokens not in self.cuts:
            shape = self.bed.shape
            routings = [
                order_reference(ids, gates, shape.num_experts, shape.d_model, block_tokens) for ids, gates in self.choices
            ]
            words = -(-routings[0].sync.numel() // 64) * 64
            sync = torch.zeros(len(routings), words, dtype=torch.int32, device=_DEVICE)
            cut = [dataclasses.replace(r, sync=sync[i, : r.sync.numel()]) for i, r in enumerate(routings)]
            self.cuts[block_tokens] = cut, sync
        return self.cuts[block_tokens]

    def call(self, index: int, routing: Routing, tiles: FfnTiles) -> torch.Tensor:
        """The op, call `index` of the rotation."""
        bed = self.bed
        fc1, fc2 = bed.weights[index % len(bed.weights)]
        return expert_ffn(
            self.xs[index], fc1, bed.bias1, fc2, bed.bias2, routing, tiles=tiles, hidden=self.hidden, out=self.out
        )

    def measure(self, tiles: FfnTiles, replays: int = 0) -> dict[str, Any]:
        """Check (NaN-poisoned output, against fp32, twice for equal bits), then time: error, repeatable, ok, us."""
        routings, sync = self.cut(tiles.block_tokens)
        outputs = []
        for _ in range(2):
            sync.zero_()
            self.out.fill_(float("nan"))
            self.hidden.fill_(float("nan"))
            outputs.append(self.call(0, routings[0], tiles).clone())
        error = relative_error(outputs[0], self.truth)
        same = torch.equal(outputs[0], outputs[1])
        result: dict[str, Any] = {"error": error, "repeatable": same, "ok": error < MAX_ERROR and same}
        if result["ok"]:
            calls = [functools.partial(self.call, i, r, tiles) for i, r in enumerate(routings)]
            result["us"] = graph_time_us(calls, before=sync.zero_, replays=replays or (7 if self.num_tokens >= 1024 else 11))
        return result

    def row(self, case: str) -> Row:
        """Measure with the tiles that a user gets."""
        bed, shape = self.bed, self.bed.shape
        tiles = select_tiles(self.num_tokens * shape.top_k, bed.weights[0][0])
        result = self.measure(tiles, replays=21)
        hit = sum(int((r.tokens_per_expert > 0).sum()) for r in self.cut(tiles.block_tokens)[0]) / len(self.xs)
        pairs = self.num_tokens * shape.top_k
        touched = int(hit * sum(w.bytes_per_expert for w in bed.weights[0])) + pairs * shape.d_model * 4
        error = result["error"] if result["repeatable"] else float("inf")
        flops = 4.0 * pairs * shape.d_model * shape.d_ff
        return Row("expert_gemm", case, result.get("us", 0.0), error, MAX_ERROR, touched, flops, launches=2)

    def grouped_mm(self) -> float:
        """us of torch's bf16 grouped_mm, rows already in expert order: the anchor. At encoder sizes it pays bias and ReLU
        (one fused pass each); at decode sizes ReLU alone, where a launch for each bias would weigh as much as a GEMM."""
        from kernels.expert_anchor.grouped import grouped_ffn

        bed = self.bed
        biases = (bed.bias1, bed.bias2) if self.num_tokens >= ENCODE_TOKENS[0] else None
        routings, _ = self.cut(16)
        offsets = [r.expert_offsets[1:].contiguous() for r in routings]
        rows = [x[r.gather_index.long() // bed.shape.top_k] for x, r in zip(self.xs, routings, strict=True)]
        experts = [
            ids.reshape(-1)[r.gather_index.long()].contiguous() for (ids, _), r in zip(self.choices, routings, strict=True)
        ]

        def layer(index: int) -> torch.Tensor:
            fc1, fc2 = bed.weights[index % len(bed.weights)]
            weights = fc1.data, fc2.data
            return grouped_ffn(rows[index], weights, biases, offsets[index], experts[index])

        return graph_time_us([functools.partial(layer, i) for i in range(len(rows))], replays=7)
