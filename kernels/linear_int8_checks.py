"""Checks of linear maps over int8 rows against their slow twin; run by kernels.checks and by pytest."""

from __future__ import annotations

import dataclasses

import torch

from kernels.compile_ahead import Job
from kernels.linear_checks import LinearCase, linear_inputs
from kernels.quantized_rows import QuantizedRows, quantize_rows
from kernels.small_linear import (
    LinearTiles,
    qkv_linear,
    qkv_linear_reference,
    small_linear,
    small_linear_reference,
)
from kernels.small_linear.jobs import int8_rows_jobs
from kernels.small_linear.tiles import select_tiles_int8_rows
from kernels.testing import relative_error

_PLAIN = (None, LinearTiles(16, 32, 16, stages=2), LinearTiles(64, 64, 32), LinearTiles(32, 128, 64, overlap=True))
_SPECIALIZED = tuple(
    LinearTiles(*sizes, split=1, warps=warps, stages=stages, prefetch=prefetch, overlap=True, specialized=True)
    for sizes, warps, stages, prefetch in (  # (bn, bk, br), ...
        ((64, 128, 16), 4, 8, True),
        ((64, 64, 32), 4, 2, False),
        ((128, 128, 64), 4, 4, True),
        ((256, 128, 64), 8, 3, False),
        ((128, 256, 128), 8, 3, False),
        ((64, 128, 128), 8, 4, False),
    )
)
_FORMS: tuple[dict[str, bool], ...] = (
    {},
    {"norm": True, "relu": True},
    {"norm": True},
    {"residual": True},
    {"relu": True, "residual": True},
)


def int8_rows_cases(*, large: bool) -> list[LinearCase]:
    """Awkward sizes in every form with the plain kernel; `large` (GPU): real sizes too. Row 1 is not finite, row 2 zeros."""
    sizes = [(1, 48, 64), (3, 33, 131), (17, 75, 96)]
    if large:
        sizes += [(320, 3072, 1024), (65, 1000, 1032), (100, 8192, 2048), (33, 1024, 4096)]
    return [
        LinearCase(*sizes[(index + number) % len(sizes)], tiles, int8=True, bias=number != 3, **form)
        for index, tiles in enumerate(_PLAIN * (2 if large else 1))
        for number, form in enumerate(_FORMS)
    ]


def int8_rows_specialized_cases() -> list[LinearCase]:
    """Hopper's own kernel: either side wide, fewer and more steps than stages, ragged rows."""
    sizes = ((256, 256), (768, 1024), (1024, 4096), (4096, 1024))
    return [
        LinearCase((1, 15, 64, 130, 321)[(2 * index + number) % 5], *sizes[(index + number) % 4], tiles, int8=True, **form)
        for index, tiles in enumerate(_SPECIALIZED)
        for number, form in enumerate(_FORMS)
    ]


def int8_rows_inputs(case: LinearCase, device: torch.device, dtype: torch.dtype) -> tuple[QuantizedRows, int, int]:
    """Codes and scales of random rows, and which row is not finite and which is all zeros (-1: none)."""
    rows = linear_inputs(dataclasses.replace(case, norm=False), device, dtype).x.float()
    rows *= 10.0 ** (torch.arange(case.rows, device=device) % 5 - 2)[:, None]
    broken, zeros = (1, 2) if case.rows > 2 else (-1, -1)
    if broken > 0:
        rows[broken, 0], rows[zeros] = float("inf"), 0.0
    return quantize_rows(rows), broken, zeros


def check_int8_rows(case: LinearCase, device: torch.device, dtype: torch.dtype) -> float:
    """Error against fp64 over poisoned output; inf where a NaN is missing or out of its row."""
    inputs = linear_inputs(case, device, dtype)
    weight, bias = inputs.map(int8=True)
    x, broken, _ = int8_rows_inputs(case, device, dtype)
    options = {"relu": case.relu, "residual": inputs.residual}
    truth = small_linear_reference(x, weight, bias, **options, out_dtype=dtype)  # type: ignore[arg-type]
    out = torch.full_like(truth, float("nan"))
    start = {"out": out} if inputs.residual is None else {"residual": inputs.residual.clone()}
    got = small_linear(x, weight, bias, relu=case.relu, tiles=case.tiles, **start)  # type: ignore[arg-type]
    if broken >= 0 and not got[broken].isnan().all():
        return float("inf")
    kept = torch.arange(case.rows, device=device) != broken
    return relative_error(got[kept], truth[kept])


def check_int8_rows_qkv(
    rows: int, d: int, k: int, tiles: LinearTiles | None, device: torch.device, dtype: torch.dtype
) -> float:
    """Larger error of queries and of cells written; inf when a cell of nobody was touched."""
    case = LinearCase(rows, 3 * d, k, norm=True, int8=True)
    weight, _ = linear_inputs(case, device, dtype).map(int8=True)
    x, broken, _ = int8_rows_inputs(case, device, dtype)
    generator = torch.Generator(device).manual_seed(rows)
    heads = next(h for h in (4, 3, 1) if d % h == 0)
    cells = torch.full((rows + 2, 5, 2, heads, d // heads), float("nan"), dtype=dtype, device=device)
    cell_rows = torch.randperm(rows, generator=generator, device=device).int()
    positions = torch.randint(0, 5, (rows,), generator=generator, device=device, dtype=torch.int32)
    if broken >= 0:
        cell_rows[broken], cell_rows[0] = -1, rows + 2
    true_q, true_cells = qkv_linear_reference(x, weight, None, cells, cell_rows, positions)
    q = qkv_linear(x, weight, None, cells, cell_rows, positions, q_out=torch.full_like(true_q, float("nan")), tiles=tiles)
    written = ~true_cells.isnan()
    if not torch.equal(cells.isnan(), ~written) or (broken >= 0 and not q[broken].isnan().all()):
        return float("inf")
    kept = torch.arange(rows, device=device) != broken
    return max(relative_error(q[kept], true_q[kept]), relative_error(cells[written], true_cells[written]))


INT8_QKV = ((1, 16, 32, None), (17, 21, 65, LinearTiles(32, 32, 16)), (9, 64, 48, LinearTiles(16, 64, 64)))
SPECIALIZED_INT8_QKV = (
    (17, 64, 128, dataclasses.replace(_SPECIALIZED[1], stages=3)),
    (320, 1024, 1024, _SPECIALIZED[2]),
    (96, 1024, 1024, _SPECIALIZED[0]),
)


def int8_rows_check_jobs(dtype: torch.dtype) -> list[Job]:
    """Compile jobs of what `int8_rows_failures` runs on a Hopper GPU."""
    jobs: list[Job] = []
    for c in int8_rows_cases(large=True) + int8_rows_specialized_cases():
        tiles = c.tiles or select_tiles_int8_rows(c.n, c.k, c.rows, torch.device("meta"))
        options = {"folded": c.norm, "relu": c.relu, "mode": int(c.residual), "hopper": True}
        jobs += int8_rows_jobs(c.n, c.k, tiles, dtype, **options)  # type: ignore[arg-type]
    for rows, d, k, own in (*INT8_QKV, *SPECIALIZED_INT8_QKV):
        tiles = own or select_tiles_int8_rows(3 * d, k, rows, torch.device("meta"))
        jobs += int8_rows_jobs(3 * d, k, tiles, dtype, mode=2, hopper=True)
    return list({repr(job): job for job in jobs}.values())


def int8_rows_failures(device: torch.device, dtype: torch.dtype, limit: float) -> list[str]:
    """Every check of this module on a GPU; what failed, one line each."""
    failed = []
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for case in int8_rows_cases(large=True) + (int8_rows_specialized_cases() if hopper else []):
        error = check_int8_rows(case, device, dtype)
        if not error <= limit:
            failed.append(f"small_linear of int8 rows {dtype} {case.name}: error {error:.2e}")
    for rows, d, k, tiles in (*INT8_QKV, *(SPECIALIZED_INT8_QKV if hopper else ())):
        error = check_int8_rows_qkv(rows, d, k, tiles, device, dtype)
        if not error <= limit:
            failed.append(f"qkv_linear of int8 rows {dtype} {(rows, d, k)} {tiles}: error {error:.2e}")
    return failed
