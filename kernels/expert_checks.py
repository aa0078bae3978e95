"""The expert layer against its slow twin, one case at a time (see `kernels.checks`)."""

from __future__ import annotations

import dataclasses

import torch

from kernels.cases import PRECISIONS, Precision
from kernels.compile_ahead import Job
from kernels.expert_gemm import FfnTiles, PackedExperts, expert_ffn, expert_ffn_reference
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.route import order_reference
from kernels.routing import Routing
from kernels.testing import random_experts, relative_error


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertCase:
    """One expert FFN: sizes, precision, tiles and how tokens meet experts (spread, one, none, few)."""

    num_tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    precision: Precision
    tiles: FfnTiles
    pattern: str = "spread"

    @property
    def name(self) -> str:
        """Readable id."""
        t = self.tiles
        mode = (
            f"pipelined-w{t.warps}-s{t.stages}.{t.x_stages}"
            if t.pipelined
            else f"fused{'-dynamic' if t.dynamic else ''}{'-prefetch' if t.prefetch else ''}-split{t.split}"
            if t.fused
            else "plain"
        )
        return (
            f"T{self.num_tokens}-D{self.d_model}-F{self.d_ff}-E{self.num_experts}-k{self.top_k}-{self.precision.name}"
            f"-t{t.block_tokens}{f'.{t.narrow}' if t.narrow else ''}-n{t.bn1}.{t.bn2}-j{t.join}-{mode}-{self.pattern}"
        )


def expert_cases(*, large: bool) -> list[ExpertCase]:
    """Awkward sizes for every precision and launch mode; `large` (GPU) adds tiles and sizes that an interpreter is
    too slow for."""
    plain, fused = FfnTiles(16, join=2), FfnTiles(16, bn1=128, join=2, fused=True, split=2)
    # d_ff: two steps of K in the second GEMM, so that split 2 has one each
    cases = [
        ExpertCase(7, 256, 512 if p.bits == 4 else 256, 3, 2, p, t) for p in PRECISIONS.values() for t in (plain, fused)
    ]
    w4, w8, b16 = PRECISIONS["w4a16"], PRECISIONS["w8a16"], PRECISIONS["bf16"]
    cases += [
        ExpertCase(1, 256, 256, 4, 1, w4, FfnTiles(16, join=4, fused=True, dynamic=True)),
        ExpertCase(33, 256, 128, 4, 1, w4, plain, "one"),
        ExpertCase(33, 256, 256, 2, 2, w8, FfnTiles(16, join=4, fused=True), "spread"),
        ExpertCase(5, 256, 512, 3, 2, w4, fused, "none"),
        ExpertCase(5, 256, 256, 3, 2, b16, plain, "none"),
        ExpertCase(19, 96, 72, 5, 2, w4, FfnTiles(16, bn1=128, join=1), "few"),
        ExpertCase(19, 96, 72, 5, 2, w8, FfnTiles(16, join=1, fused=True), "few"),
        ExpertCase(19, 96, 72, 5, 2, b16, FfnTiles(16, join=1, fused=True), "few"),
        ExpertCase(3, 96, 200, 2, 1, PRECISIONS["w4a16-g64"], FfnTiles(16, join=2)),
        ExpertCase(33, 256, 256, 3, 2, w8, FfnTiles(8, join=4)),
        ExpertCase(33, 256, 512, 3, 2, w4, FfnTiles(8, bn1=128, join=4, fused=True, dynamic=True), "few"),
        ExpertCase(19, 96, 72, 5, 2, b16, FfnTiles(8, join=1, fused=True), "few"),
        # tiles of few pairs and of many in one launch
        ExpertCase(60, 256, 256, 3, 1, w8, FfnTiles(32, join=2, narrow=16)),
        ExpertCase(45, 96, 72, 2, 1, w4, FfnTiles(32, bn1=128, join=1, narrow=16), "few"),
        ExpertCase(60, 96, 72, 3, 2, b16, FfnTiles(64, join=1, narrow=32)),
        ExpertCase(40, 96, 200, 2, 1, PRECISIONS["w4a16-g64"], FfnTiles(32, join=2, narrow=16)),
    ]
    if large:
        modes = [
            FfnTiles(16, join=4),
            FfnTiles(64, 128, 128, 4, 8, 2),
            FfnTiles(128, 256, 256, 2, 16, 2),
            FfnTiles(32, 128, 128, 2, narrow=16),
            FfnTiles(8, 128, 128, 4, fused=True, split=2, dynamic=True),
            FfnTiles(16, join=2, fused=True, prefetch=True),
            FfnTiles(32, 128, 128, 2, 8, 3, fused=True, dynamic=True),
            FfnTiles(16, 64, 64, 4, fused=True, split=4, dynamic=True),
            FfnTiles(16, 128, 128, 1, fused=True, split=4, prefetch=True),
        ]
        for tokens, pattern in ((1, "spread"), (77, "spread"), (300, "one"), (513, "few")):
            cases += [ExpertCase(tokens, 1024, 2048, 16, 2, p, t, pattern) for p in (w4, w8, b16) for t in modes]
        grouped = [PRECISIONS[n] for n in ("w4a16-g64", "w4a16-g128", "w8a16-g64", "w8a16-g128")]
        cases += [ExpertCase(77, 1024, 2048, 16, 2, p, t) for p in grouped for t in modes if t.join == 2]
    return [dataclasses.replace(c, tiles=dataclasses.replace(c.tiles, programs_per_sm=1)) for c in cases]


def pipelined_cases() -> list[ExpertCase]:
    """The launch for many tokens (compute capability 9.0 alone): every cut of the features, few and many tokens a tile."""
    tiles = {
        "w4a16": (
            FfnTiles(32, 128, 64, stages=2, pipelined=True),
            FfnTiles(128, 256, 128, 1, 8, 2, pipelined=True),
            FfnTiles(64, 256, 256, 1, 8, 2, pipelined=True, narrow=32),
            FfnTiles(32, 128, 128, stages=3, pipelined=True, x_stages=3),
            FfnTiles(64, 128, 128, stages=2, pipelined=True),
        ),
        "w8a16": (
            FfnTiles(64, 128, 64, stages=3, pipelined=True),
            FfnTiles(32, 128, 64, stages=3, pipelined=True, narrow=16),
            FfnTiles(128, 128, 256, 1, 8, 3, pipelined=True, x_stages=3),
            FfnTiles(32, 128, 128, stages=3, pipelined=True, x_stages=3),
        ),
    }
    meetings = ((1, "spread"), (77, "spread"), (300, "one"), (513, "few"), (40, "none"), (900, "spread"))
    chained = FfnTiles(32, 128, 128, stages=2, programs_per_sm=1, pipelined=True)
    more_programs_than_first_items = ExpertCase(77, 1024, 512, 16, 2, PRECISIONS["w4a16"], chained)
    return [
        more_programs_than_first_items,
        *(
            ExpertCase(tokens, 1024, 2048, 16, 2, PRECISIONS[name], dataclasses.replace(t, programs_per_sm=1), pattern)
            for name, choices in tiles.items()
            for t in choices
            for tokens, pattern in meetings
        ),
    ]


def expert_case_jobs(case: ExpertCase, dtype: torch.dtype) -> list[Job]:
    """What a case compiles."""
    p = case.precision
    return ffn_jobs(case.d_model, case.d_ff, case.top_k, p.bits, p.group_size, case.tiles, dtype)


def make_expert_ids(case: ExpertCase, generator: torch.Generator) -> torch.Tensor:
    """int32[T, k]; about a fifth of the tokens inactive (-1), all of them for pattern `none`."""
    device = generator.device
    scores = torch.rand(case.num_tokens, case.num_experts, generator=generator, device=device)
    if case.pattern == "one":
        scores[:, 1] = 2.0
    if case.pattern == "few":
        scores[:, 2:] -= 2.0
    ids = scores.topk(case.top_k, dim=1).indices.int()
    share = {"none": 2.0, "one": 0.0}.get(case.pattern, 0.2 if case.num_tokens > 1 else 0.0)
    ids[torch.rand(case.num_tokens, generator=generator, device=device) < share] = -1
    return ids


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertInputs:
    """Operands of one case, NaN wherever nothing may be read."""

    x: torch.Tensor
    fc1: PackedExperts
    bias1: torch.Tensor
    fc2: PackedExperts
    bias2: torch.Tensor
    routing: Routing

    def run(self, tiles: FfnTiles) -> torch.Tensor:
        """The op over poisoned scratch and output."""
        pairs, top_k = self.routing.gather_index.numel(), self.routing.top_k
        hidden = self.x.new_full((pairs, self.fc1.num_features), float("nan"))
        out = self.x.new_full((pairs // top_k, top_k, self.fc2.num_features), float("nan"))
        self.routing.sync.zero_()
        return expert_ffn(
            self.x, self.fc1, self.bias1, self.fc2, self.bias2, self.routing, tiles=tiles, hidden=hidden, out=out
        )


def expert_inputs(case: ExpertCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> ExpertInputs:
    """Random operands; rows of inactive tokens are NaN, and so is everything past the routing's end an out-of-range
    index."""
    generator = torch.Generator(device).manual_seed(seed)
    p, e = case.precision, case.num_experts
    fc1 = random_experts(e, case.d_ff, case.d_model, p.bits, p.group_size, dtype, generator)
    fc2 = random_experts(e, case.d_model, case.d_ff, p.bits, p.group_size, dtype, generator)
    bias1, bias2 = (torch.randn(e, n, generator=generator, device=device).to(dtype) for n in (case.d_ff, case.d_model))
    ids = make_expert_ids(case, generator)
    x = torch.randn(case.num_tokens, case.d_model, generator=generator, device=device).to(dtype)
    x[ids[:, 0] < 0] = float("nan")
    gates = torch.rand(case.num_tokens, case.top_k, generator=generator, device=device)
    routing = order_reference(ids, gates, e, case.d_model, case.tiles.block_tokens)
    routing.gather_index[int(routing.expert_offsets[-1]) :] = 2**30
    routing.tiles[int(routing.num_tiles) :] = 2**30
    return ExpertInputs(x, fc1, bias1, fc2, bias2, routing)


def check_expert_case(case: ExpertCase, device: torch.device, dtype: torch.dtype) -> float:
    """Error over active pairs against fp64; inf when an inactive pair was written or two runs on a GPU differ in a bit."""
    inputs = expert_inputs(case, device, dtype)
    out = inputs.run(case.tiles)
    again = inputs.run(case.tiles) if device.type == "cuda" else out  # the interpreter has no timing that could matter
    active = inputs.routing.expert_ids >= 0
    if not out[~active].isnan().all() or not torch.equal(out[active], again[active]):
        return float("inf")
    if not active.any():
        return 0.0
    truth = expert_ffn_reference(
        inputs.x, inputs.fc1, inputs.bias1, inputs.fc2, inputs.bias2, inputs.routing, dtype=torch.float64
    )
    return relative_error(out[active], truth[active])
