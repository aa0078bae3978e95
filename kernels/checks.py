"""Every op against its slow twin, one case at a time: python -m kernels.checks (GPU), or through pytest on either device.

With --small a few tiny awkward cases of every op, little enough for compute-sanitizer to watch (kernels.small_checks). On a
CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), in fp32 and fp16 and with the
plain decoder; on a GPU in bf16 and fp16 with the assembly decoder.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from kernels.add_layernorm import add_layernorm, add_layernorm_reference, add_slots
from kernels.attention_checks import attention_failures
from kernels.cases import PRECISIONS, Precision
from kernels.compile_ahead import Job, compile_ahead
from kernels.expert_gemm import FfnTiles, PackedExperts, expert_ffn, expert_ffn_reference
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.head_checks import failed_head_checks, head_check_jobs
from kernels.linear_checks import linear_check_jobs, linear_failures
from kernels.route import order_reference, route, route_reference, semaphores
from kernels.route.tiles import GateTiles
from kernels.routing import Routing, empty_routing
from kernels.testing import random_experts, relative_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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
            f"-t{t.block_tokens}-n{t.bn1}.{t.bn2}-j{t.join}-{mode}-{self.pattern}"
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
    ]
    if large:
        modes = [
            FfnTiles(16, join=4),
            FfnTiles(64, 128, 128, 4, 8, 2),
            FfnTiles(128, 256, 256, 2, 16, 2),
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
        "w4a16": (FfnTiles(32, 128, 64, stages=2, pipelined=True), FfnTiles(128, 256, 128, 1, 8, 2, pipelined=True)),
        "w8a16": (
            FfnTiles(64, 128, 64, stages=3, pipelined=True),
            FfnTiles(128, 128, 256, 1, 8, 3, pipelined=True, x_stages=3),
        ),
    }
    meetings = ((1, "spread"), (77, "spread"), (300, "one"), (513, "few"), (40, "none"), (900, "spread"))
    return [
        ExpertCase(tokens, 1024, 2048, 16, 2, PRECISIONS[name], dataclasses.replace(t, programs_per_sm=1), pattern)
        for name, choices in tiles.items()
        for t in choices
        for tokens, pattern in meetings
    ]


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


def check_add_layernorm(rows: int, features: int, slots: int, device: torch.device, dtype: torch.dtype) -> float:
    """Larger error of the two results; slots of inactive pairs are NaN. inf where the add alone gives other bits."""
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    residual, weight, bias = draw(rows, features), draw(features), draw(features)
    delta = draw(rows, slots, features) if slots else None
    ids = None
    if delta is not None:
        ids = torch.randint(-1, 3, (rows, slots), generator=generator, device=device, dtype=torch.int32)
        delta[ids < 0] = float("nan")
    truth = add_layernorm_reference(residual, delta, weight, bias, expert_ids=ids)
    out = torch.full_like(residual, float("nan"))
    new, normed = add_layernorm(residual.clone(), delta, weight, bias, expert_ids=ids, out=out)
    if delta is not None and not torch.equal(add_slots(residual.clone(), delta, expert_ids=ids), new):
        return float("inf")
    return max(relative_error(new, truth[0]), relative_error(normed, truth[1]))


ROUTE_SIZES = ((1, 64, 8, 2), (37, 64, 6, 2), (40, 256, 128, 2), (33, 128, 32, 1), (16, 96, 5, 2), (17, 75, 3, 1))
LAYERNORM_SIZES = ((1, 32, 0), (3, 100, 1), (5, 256, 2), (2, 1000, 2))


def all_jobs(dtypes: tuple[torch.dtype, ...]) -> list[Job]:
    """Compile jobs of the full run."""
    jobs = [
        job
        for dtype in dtypes
        for c in (*expert_cases(large=True), *pipelined_cases())
        for job in ffn_jobs(c.d_model, c.d_ff, c.top_k, c.precision.bits, c.precision.group_size, c.tiles, dtype)
    ]
    jobs += [job for dtype in dtypes for job in linear_check_jobs(dtype)]
    return jobs + [job for dtype in dtypes for job in head_check_jobs(dtype)]


def all_failures(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Every check of the full run; one line for each that fails."""
    pipelined = pipelined_cases() if torch.cuda.get_device_capability(device) == (9, 0) else []
    for case in (*expert_cases(large=True), *pipelined):
        error = check_expert_case(case, device, dtype)
        if not error <= LIMITS[dtype]:
            yield f"expert_ffn {dtype} {case.name}: error {error:.2e}"
    for sizes in (
        *ROUTE_SIZES,
        (1, 1024, 32, 2),
        (16, 2048, 128, 2),
        (320, 1024, 32, 1),
        (320, 2048, 128, 2),
        (1000, 2048, 128, 2),
    ):
        trouble = check_route(*sizes, device, dtype)
        if trouble:
            yield f"route {dtype} {sizes}: {trouble}"
    for shape in (*LAYERNORM_SIZES, (320, 2048, 2)):
        error = check_add_layernorm(*shape, device, dtype)
        if not error <= LIMITS[dtype]:
            yield f"add_layernorm {dtype} {shape}: error {error:.2e}"
    yield from attention_failures(device, dtype, LIMITS[dtype], large=True)
    yield from linear_failures(device, dtype, LIMITS[dtype])
    yield from (line.removeprefix("FAILED ") for line in failed_head_checks(device, dtype))


def main(arguments: list[str] | None = None) -> int:
    """Run the checks on the GPU; exit 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few tiny cases of every op")
    parser.add_argument(
        "--no-compile-ahead",
        action="store_true",
        help="compile kernels when they are first launched and not in a pool of processes before: for compute-sanitizer",
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args(arguments)
    from kernels.small_checks import small_failures, small_jobs  # builds on the checks of this module

    dtypes = tuple(DTYPES[name] for name in options.dtype)
    if not options.no_compile_ahead:
        jobs = small_jobs(dtypes) if options.small else all_jobs(dtypes)
        broken = [result.error for result in compile_ahead(jobs, capability=90) if result.error]
        print(f"compiled {len(jobs)} kernels; {len(broken)} failed {broken[:2]}", flush=True)
    device, failed = torch.device("cuda"), 0
    for dtype in dtypes:
        for trouble in (small_failures if options.small else all_failures)(device, dtype):
            failed += 1
            print(f"FAILED {trouble}", flush=True)
    torch.cuda.synchronize()
    print(f"checks: {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
