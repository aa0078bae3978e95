"""No kernel is further from fp64 than torch's own GEMM or attention in the same dtype, past 5 %."""

from collections.abc import Callable

import pytest
import torch

from kernels.cases import PRECISIONS
from kernels.compile_ahead import Job
from kernels.error_ratios import (
    LIMIT,
    ROUTER_LIMIT,
    ROUTER_SIZES,
    Ratio,
    attention_ratios,
    expert_ratio_cases,
    expert_ratio_jobs,
    expert_ratios,
    head_ratios,
    router_ratio,
)
from kernels.expert_checks import ExpertCase
from kernels.expert_gemm import FfnTiles

DTYPES = [torch.bfloat16, torch.float16]
INTERPRETED = [
    ExpertCase(9, 256, 512, 3, 2, PRECISIONS[name], tiles)
    for name in ("w4a16", "w8a16-g64", "bf16")
    for tiles in (FfnTiles(16, join=2), FfnTiles(16, bn1=128, join=2, fused=True, split=2, programs_per_sm=1))
]


def beyond(ratios: list[Ratio]) -> list[Ratio]:
    assert ratios
    return [r for r in ratios if not r.ratio <= LIMIT]


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda c: c.name)
def test_interpreted_experts_are_as_exact_as_a_16_bit_gemm(case: ExpertCase, cpu: torch.device) -> None:
    assert beyond(list(expert_ratios(case, cpu, torch.float16))) == []


@pytest.mark.parametrize("bits", [16, 8])
def test_interpreted_head_is_as_exact_as_a_16_bit_gemm(bits: int, cpu: torch.device) -> None:
    assert beyond(list(head_ratios(3, 64, 257, bits, cpu, torch.float16))) == []


def test_interpreted_attention_is_as_exact_as_torch(cpu: torch.device) -> None:
    assert beyond(list(attention_ratios(9, 2, 32, cpu, torch.float16))) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(1, 96, 5), (35, 1000, 33)], ids=str)
def test_interpreted_router_computes_in_fp32(sizes: tuple[int, int, int], dtype: torch.dtype, cpu: torch.device) -> None:
    assert router_ratio(*sizes, cpu, dtype).ours <= ROUTER_LIMIT


def test_a_worse_result_and_nan_are_seen() -> None:
    worse, broken = Ratio("", 1.06e-3, 1e-3), Ratio("", float("nan"), 1e-3)
    assert beyond([worse, Ratio("", 1e-3, 1e-3), broken, Ratio("", 0.0, 0.0)]) == [worse, broken]


@pytest.fixture(scope="module")
def compiled(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> None:
    cases = expert_ratio_cases(pipelined=torch.cuda.get_device_capability() == (9, 0))
    compile_first([job for dtype in DTYPES for job in expert_ratio_jobs(cases, dtype)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", expert_ratio_cases(pipelined=True), ids=lambda c: c.name)
@pytest.mark.usefixtures("compiled")
def test_gpu_experts(case: ExpertCase, dtype: torch.dtype, cuda: torch.device) -> None:
    if case.tiles.pipelined and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    assert beyond(list(expert_ratios(case, cuda, dtype))) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("rows", [1, 17, 320])
def test_gpu_head(rows: int, bits: int, dtype: torch.dtype, cuda: torch.device) -> None:
    assert beyond(list(head_ratios(rows, 1024, 32001, bits, cuda, dtype))) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize("length", [1, 17, 64, 500])
def test_gpu_attention(length: int, features: int, dtype: torch.dtype, cuda: torch.device) -> None:
    assert beyond(list(attention_ratios(length, 16, features, cuda, dtype))) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", ROUTER_SIZES, ids=str)
def test_gpu_router_computes_in_fp32(sizes: tuple[int, int, int], dtype: torch.dtype, cuda: torch.device) -> None:
    assert router_ratio(*sizes, cuda, dtype).ours <= ROUTER_LIMIT
