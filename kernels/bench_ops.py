"""The benchmark of every op: data, check against the reference, timing, anchors.

T tokens, R rows, k active experts, E experts, D d_model, F d_ff.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from kernels.add_layernorm import add_layernorm, add_layernorm_reference
from kernels.bench_rows import Machine, Row, time_if_right
from kernels.cases import (
    DECODE_TOKENS,
    ENCODE_TOKENS,
    NLLB_54B,
    PAPER,
    PRECISIONS,
    TABLE1_EXPERTS,
    TABLE1_TOKENS,
    FfnShape,
)
from kernels.expert_bench import ExpertBed, ExpertPoint
from kernels.route import FEW_TOKENS, route, route_reference, semaphores
from kernels.testing import graph_time_us, relative_error


def expert_gemm_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Both expert GEMMs, all precisions, zipf (and, unless quick, uniform) routing. grouped_mm is timed again beside every
    row, on the same routing: clocks and memory drift by several percent within a run."""
    del machine
    for shape in (PAPER, NLLB_54B):
        plain = ExpertBed.build(shape, PRECISIONS["bf16"])
        anchors: dict[tuple[int, float], ExpertPoint] = {}
        for name in ("bf16", "w4a16", "w8a16", *(() if quick else ("w4a16-g128", "w8a16-g128"))):
            bed = plain if name == "bf16" else ExpertBed.build(shape, PRECISIONS[name])
            for tokens in expert_sizes(shape, quick):
                for power in (0.8,) if quick or tokens not in (64, 320) else (0.8, 0.0):
                    point = bed.point(tokens, power)
                    anchor = anchors.setdefault((tokens, power), point)
                    row = point.row(f"{shape.name} {name} T={tokens}{'' if power else ' uniform'}")
                    yield dataclasses.replace(row, anchors_us={"grouped_mm": anchor.grouped_mm()})
            del bed, point
            torch.cuda.empty_cache()
        del plain, anchors, anchor
        torch.cuda.empty_cache()


def expert_sizes(shape: FfnShape, quick: bool) -> tuple[int, ...]:
    """Token counts to show."""
    if shape is NLLB_54B:
        return (1, 64, 320, 4096) if quick else (1, 4, 16, 64, 320, 1024, 4096)
    return (1, 64, 320, 4096, 16384) if quick else DECODE_TOKENS + ENCODE_TOKENS


def table1_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """The paper's Table 1: 40 tokens over 1 to 32 active experts of the paper's shape; int4 and int8 beside our own bf16."""
    del machine, quick
    times: dict[int, float] = {}
    for name in ("bf16", "w8a16", "w4a16"):
        bed = ExpertBed.build(PAPER, PRECISIONS[name])
        for active in TABLE1_EXPERTS:
            row = bed.point(TABLE1_TOKENS, 0.0, active_experts=active).row(f"table1 {name} active={active}")
            if name == "bf16":
                times[active] = row.us
            yield dataclasses.replace(row, op="table1", anchors_us={"our bf16": times[active]})
        del bed
        torch.cuda.empty_cache()


def route_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Router at decode sizes; the check counts wrong experts (none may differ) and gate error."""
    del machine
    for shape in (PAPER, NLLB_54B):
        for rows in (1, 320) if quick else (1, 16, 64, 320, 1024):
            yield _route_row(shape, rows)


def _route_row(shape: FfnShape, rows: int) -> Row:
    copies = 64
    generator = torch.Generator("cuda").manual_seed(rows)
    xs = [torch.randn(rows, shape.d_model, device="cuda", generator=generator).bfloat16() for _ in range(copies)]
    weights = [
        torch.randn(shape.num_experts, shape.d_model, device="cuda", generator=generator) * 0.05 for _ in range(copies)
    ]
    counters = semaphores(rows, torch.device("cuda"))
    options = {"top_k": shape.top_k, "block_tokens": 16, "gate_scale": 0.8}
    calls = [functools.partial(route, x, w, semaphores=counters, **options) for x, w in zip(xs, weights, strict=True)]  # type: ignore[arg-type]
    out, truth = calls[0](), route_reference(xs[0], weights[0], **options)  # type: ignore[arg-type]
    tiles = int(truth.num_tiles)
    same = all(
        torch.equal(getattr(out, f), getattr(truth, f))
        for f in ("expert_ids", "tokens_per_expert", "expert_offsets", "gather_index", "num_tiles")
    ) and torch.equal(out.tiles[:tiles], truth.tiles[:tiles])
    # Near ties may fall either way between two fp32 GEMMs: then the order differs and only the share of equal
    # choices counts.
    wrong = float((out.expert_ids != truth.expert_ids).float().mean())
    error = max(relative_error(out.gate_weights, truth.gate_weights), 0.0 if same else max(wrong, 1e-9) if wrong else 1.0)
    touched = xs[0].numel() * 2 + weights[0].numel() * 4 + out.gather_index.numel() * 20
    us = time_if_right(error, 1e-2, lambda: graph_time_us(calls))
    launches = 1 if rows <= FEW_TOKENS else 2
    name = f"E={shape.num_experts} D={shape.d_model} top-{shape.top_k} R={rows}"
    return Row("route", name, us, error, 1e-2, touched, launches=launches)


def add_layernorm_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Residual add and norm, with one delta and with top-2 expert outputs."""
    del machine
    for features in (1024, 2048):
        for rows in (1, 320) if quick else (1, 32, 320, 1024):
            for slots in (1, 2):
                yield _add_layernorm_row(features, rows, slots)


def _add_layernorm_row(features: int, rows: int, slots: int) -> Row:
    generator = torch.Generator("cuda").manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    residuals, deltas = [draw(rows, features) for _ in range(32)], [draw(rows, slots, features) for _ in range(32)]
    weight, bias = draw(features), draw(features)
    truth = add_layernorm_reference(residuals[0], deltas[0], weight, bias)
    out = torch.full_like(residuals[0], float("nan"))
    new, out = add_layernorm(residuals[0].clone(), deltas[0], weight, bias, out=out)
    error = max(relative_error(new, truth[0]), relative_error(out, truth[1]))
    calls = [functools.partial(add_layernorm, r, d, weight, bias, out=out) for r, d in zip(residuals, deltas, strict=True)]

    def eager(index: int) -> torch.Tensor:
        return torch.nn.functional.layer_norm(residuals[index] + deltas[index].sum(1), (features,), weight, bias)

    us = time_if_right(error, 4e-3, lambda: graph_time_us(calls))
    anchor = graph_time_us([functools.partial(eager, i) for i in range(32)])
    touched = rows * features * 2 * (3 + slots)
    return Row(
        "add_layernorm", f"D={features} R={rows} slots={slots}", us, error, 4e-3, touched, anchors_us={"torch": anchor}
    )
