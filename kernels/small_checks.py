"""One or two tiny awkward cases of every op, and one whole step of all of them: python -m kernels.checks --small.

Little work, so that a tool which slows a GPU down tens of times (compute-sanitizer) can watch all kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.attention_checks import Case, check_inputs, make_inputs
from kernels.cases import PRECISIONS
from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.cross_attention_checks import CrossCase
from kernels.encoder_attention_checks import EncoderCase
from kernels.expert_checks import ExpertCase, check_expert_case
from kernels.expert_gemm import FfnTiles
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.head_checks import HEAD_LIMIT, HeadCase, check_head_case
from kernels.head_topk import HeadTiles
from kernels.head_topk.jobs import head_jobs
from kernels.head_topk.tiles import default_tiles as default_head_tiles
from kernels.layernorm_checks import check_add_layernorm
from kernels.linear_checks import LinearCase, check_embed, check_qkv_linear, check_small_linear
from kernels.replay_memory import EXPERT_TILES, TINY
from kernels.replay_sets import record_sets
from kernels.replay_step import Step
from kernels.route_checks import check_route
from kernels.self_attention_checks import GroupCase, SelfCase
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import linear_jobs
from kernels.small_linear.tiles import default_tiles as default_linear_tiles

_W4, _W8, _BF16 = (PRECISIONS[name] for name in ("w4a16", "w8a16", "bf16"))
EXPERT_CASES = (
    ExpertCase(19, 96, 72, 5, 2, _W4, FfnTiles(16, bn1=128, join=1), "few"),
    ExpertCase(7, 256, 512, 3, 2, _W4, FfnTiles(16, bn1=128, join=2, fused=True, split=2, programs_per_sm=1)),
    ExpertCase(3, 96, 200, 2, 1, PRECISIONS["w4a16-g64"], FfnTiles(16, join=2)),
    ExpertCase(19, 96, 72, 5, 2, _W8, FfnTiles(16, join=1, fused=True, programs_per_sm=1), "few"),
    ExpertCase(5, 96, 72, 3, 2, _BF16, FfnTiles(16, join=1, fused=True, dynamic=True), "none"),
    ExpertCase(33, 96, 72, 4, 1, _BF16, FfnTiles(16, join=2), "one"),
)
HOPPER_EXPERT_CASES = (
    ExpertCase(19, 512, 512, 3, 2, _W4, FfnTiles(32, 128, 64, stages=2, programs_per_sm=1, pipelined=True), "few"),
    ExpertCase(37, 512, 256, 2, 1, _W8, FfnTiles(32, 64, 128, stages=2, programs_per_sm=1, pipelined=True), "one"),
)
ATTENTION_CASES: tuple[Case, ...] = (
    SelfCase(3, 32, (5, 0, 17, 33)),
    SelfCase(2, 64, (9, 9, 9, 37, 37, 37, 1), beam=3, max_positions=40),
    CrossCase(3, 32, (4, 0, 8, 1), (24, 10, 33, 65)),
    GroupCase(2, 64, (8, -2, 2, 5), (40, 7, 1, 33), (39, 3, 1, 32)),
    CrossCase(1, 128, (2, 4, 0), (40, 0, 0)),
    CrossCase(2, 64, (3, 5), (31, 70)),
    EncoderCase(1, 64, (3, -2, 70, 1, -3)),
)
LINEAR_CASES = (
    LinearCase(3, 33, 131, LinearTiles(32, 64, 32, fuse_norm=False), norm=True, relu=True),
    LinearCase(17, 75, 96, LinearTiles(16, 16, 16, split=3), residual=True, int8=True, bias=False),
    LinearCase(3, 64, 96, LinearTiles(64, 32, 16, prefetch=True, overlap=True), relu=True),
    LinearCase(17, 75, 96, LinearTiles(library=True), norm=True, relu=True),
    LinearCase(33, 17, 300, norm=True, int8=True),
    LinearCase(1, 33, 131, LinearTiles(4, br=1, warps=1, overlap=True), norm=True, relu=True),
    LinearCase(3, 35, 96, LinearTiles(8, br=4, overlap=True), residual=True, int8=True),
    LinearCase(67, 40, 96, LinearTiles(32, 32, 64, gram=True, overlap=True), norm=True),
)
HOPPER_LINEAR_CASES = (
    LinearCase(17, 64, 128, LinearTiles(64, 64, 16, stages=3, overlap=True, specialized=True), norm=True, relu=True),
)
QKV_CASES = ((17, 21, 65, LinearTiles(32, 32, 16)), (9, 64, 48, LinearTiles(16, 64, 16, split=2)))
HEAD_CASES = (
    HeadCase(3, 48, 65, 16, tiles=HeadTiles(32, 16, block_features=32, gated=True)),
    HeadCase(3, 33, 129, 2, bits=8, tiles=HeadTiles(64, 16, block_features=32)),
    HeadCase(34, 32, 127, 2, tiles=HeadTiles(64, 32, 16, block_features=32, slice_rows=16, gated=True, tma=True)),
)
HOPPER_HEAD_CASES = (
    HeadCase(34, 64, 330, 2, tiles=HeadTiles(128, 128, stages=6, gated=True, tma=True, specialized=True)),
    HeadCase(129, 96, 257, 8, tiles=HeadTiles(128, 128, 64, stages=5, tma=True, specialized=True)),
)


def small_jobs(dtypes: tuple[torch.dtype, ...]) -> list[Job]:
    """Compile jobs of the kernels that take longest to compile, on a Hopper GPU."""
    jobs: list[Job] = []
    for dtype in dtypes:
        for c in (*EXPERT_CASES, *HOPPER_EXPERT_CASES):
            p = c.precision
            jobs += ffn_jobs(c.d_model, c.d_ff, c.top_k, p.bits, p.group_size, c.tiles, dtype)
        for expert_tiles in EXPERT_TILES:
            jobs += ffn_jobs(TINY.d_model, TINY.d_ff, TINY.top_k, 4, 0, expert_tiles, dtype)
        for line in (*LINEAR_CASES, *HOPPER_LINEAR_CASES):
            tiles = line.tiles or default_linear_tiles(line.n, line.k, line.rows, 8 if line.int8 else 16, fixed=False)
            what = {"int8": line.int8, "norm": line.norm, "relu": line.relu, "mode": int(line.residual)}
            jobs += linear_jobs(line.n, line.k, tiles, dtype, **what, hopper=True)  # type: ignore[arg-type]
        for h in (*HEAD_CASES, *HOPPER_HEAD_CASES):
            head_tiles = h.tiles or default_head_tiles(h.num_rows, dtype)
            for ban in (True, False):
                jobs += head_jobs(h.num_features, h.vocab_size, h.k, h.bits, head_tiles, dtype, has_banned=ban)
    return jobs


def small_failures(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """One line for each case that fails on this device."""
    limit = LIMITS[dtype]
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    experts = (*EXPERT_CASES, *HOPPER_EXPERT_CASES) if hopper else EXPERT_CASES
    errors = [(f"expert_ffn {case.name}", check_expert_case(case, device, dtype)) for case in experts]
    errors += [(f"add_layernorm {s}", check_add_layernorm(*s, device, dtype)) for s in ((3, 100, 1), (2, 1000, 2))]
    errors += [
        (f"{type(c).__name__.removesuffix('Case')} attention {c.name}", check_inputs(make_inputs(c, device, dtype)))
        for c in ATTENTION_CASES
    ]
    lines = (*LINEAR_CASES, *HOPPER_LINEAR_CASES) if hopper else LINEAR_CASES
    errors += [(f"small_linear {line.name}", check_small_linear(line, device, dtype)) for line in lines]
    errors += [(f"qkv_linear {c}", check_qkv_linear(*c, device, dtype)) for c in QKV_CASES]
    yield from (f"{name} {dtype}: error {error:.2e}" for name, error in errors if not error <= limit)
    for head in (*HEAD_CASES, *HOPPER_HEAD_CASES) if hopper else HEAD_CASES:
        error = check_head_case(head, device, dtype)
        if not error <= HEAD_LIMIT:
            yield f"head_topk {head.name} {dtype}: error {error:.2e}"
    for sizes in ((3, 64, 5, 2), (37, 64, 6, 2), (33, 128, 32, 1), (70, 64, 130, 2)):
        trouble = check_route(*sizes, device, dtype)
        if trouble:
            yield f"route {sizes} {dtype}: {trouble}"
    if not check_embed(5, 100, device, dtype):
        yield f"embed {dtype}: bits differ"
    step = Step(TINY, dtype, device, limit)
    yield from (f"step {dtype}: {line}" for line in record_sets(step, 1)[1])
