"""Linear maps over int8 rows and int8 weights."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.linear_checks import LinearCase, linear_inputs
from kernels.linear_int8_checks import (
    INT8_QKV,
    SPECIALIZED_INT8_QKV,
    check_int8_rows,
    check_int8_rows_qkv,
    int8_rows_cases,
    int8_rows_check_jobs,
    int8_rows_specialized_cases,
)
from kernels.quantized_rows import QuantizedRows, quantize_rows
from kernels.small_linear import (
    FoldedLinear,
    Int8Linear,
    LinearTiles,
    qkv_linear,
    quantize_int8,
    small_linear,
    small_linear_reference,
)

CASES = int8_rows_cases(large=False)
SPECIALIZED = LinearTiles(64, 128, 32, stages=4, overlap=True, specialized=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_interpreter_matches_fp64(case: LinearCase, cpu: torch.device) -> None:
    dtype = torch.float16 if CASES.index(case) % 2 else torch.float32
    assert check_int8_rows(case, cpu, dtype) <= LIMITS[dtype]


@pytest.mark.parametrize("case", INT8_QKV, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_qkv_interpreter_matches_fp64(case: tuple[int, int, int, LinearTiles | None], cpu: torch.device) -> None:
    assert check_int8_rows_qkv(*case, cpu, torch.float32) <= LIMITS[torch.float32]


@pytest.fixture(scope="module")
def compiled(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> bool:
    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper:
        compile_first([job for dtype in (torch.bfloat16, torch.float16) for job in int8_rows_check_jobs(dtype)])
    return hopper


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", int8_rows_cases(large=True) + int8_rows_specialized_cases(), ids=lambda c: c.name)
def test_gpu_matches_fp64(case: LinearCase, dtype: torch.dtype, cuda: torch.device, compiled: bool) -> None:
    if case.tiles is not None and case.tiles.specialized and not compiled:
        pytest.skip("needs a GPU of compute capability 9.x")
    assert check_int8_rows(case, cuda, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", (*INT8_QKV, *SPECIALIZED_INT8_QKV), ids=str)
def test_qkv_gpu_matches_fp64(
    case: tuple[int, int, int, LinearTiles | None], dtype: torch.dtype, cuda: torch.device, compiled: bool
) -> None:
    if case[3] is not None and case[3].specialized and not compiled:
        pytest.skip("needs a GPU of compute capability 9.x")
    assert check_int8_rows_qkv(*case, cuda, dtype) <= LIMITS[dtype]


@pytest.mark.parametrize("tiles", [None, LinearTiles(16, 32, 16), LinearTiles(64, 128, 32)], ids=str)
def test_sums_are_those_of_integers(tiles: LinearTiles | None, cpu: torch.device) -> None:
    # powers of two as scales: the result is exact, so any wrong code, scale or order shows; the sums leave fp32's integers
    codes = torch.full((5, 4096), 127, dtype=torch.int8)
    codes[1::2, ::3] = -127
    codes[:, -1] = torch.arange(5)
    weight = Int8Linear(torch.randint(100, 128, (33, 4096), dtype=torch.int8), 2.0 ** torch.randint(-3, 4, (33,)))
    x = QuantizedRows(codes, 2.0 ** torch.arange(5).float())
    exact = codes.long() @ weight.codes.long().T
    assert exact.abs().max() > 1 << 24
    truth = exact.float() * x.scales[:, None] * weight.scales
    assert torch.equal(small_linear(x, weight, tiles=tiles, dtype=torch.float32), truth)


def bits_depend_on_the_row_alone(device: torch.device, dtype: torch.dtype, n: int, k: int, tiles: list[LinearTiles]) -> bool:
    inputs = linear_inputs(LinearCase(40, n, k), device, dtype)
    weight, bias = inputs.map(int8=True)
    x = quantize_rows(inputs.x)
    whole = small_linear(x, weight, bias, dtype=dtype)
    same = True
    for first, last in ((0, 1), (5, 8), (3, 20), (0, 40)):
        rows = QuantizedRows(x.codes[first:last].clone(), x.scales[first:last].clone())
        for choice in (None, *tiles):
            same &= torch.equal(small_linear(rows, weight, bias, dtype=dtype, tiles=choice), whole[first:last])
    return same


def test_neither_tiles_nor_batch_change_bits(cpu: torch.device) -> None:
    tiles = [LinearTiles(16, 32, 16), LinearTiles(32, 64, 32)]
    assert bits_depend_on_the_row_alone(cpu, torch.float32, 75, 131, tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3072, 1024), (1024, 4096)], ids=str)
def test_neither_tiles_nor_batch_change_bits_on_the_gpu(shape: tuple[int, int], cuda: torch.device, compiled: bool) -> None:
    tiles = [LinearTiles(16, 32, 16), LinearTiles(64, 128, 32, warps=8)]
    if compiled:
        tiles += [SPECIALIZED, replace(SPECIALIZED, br=64), replace(SPECIALIZED, bn=128, br=128, warps=8)]
    assert bits_depend_on_the_row_alone(cuda, torch.bfloat16, *shape, tiles)


@pytest.mark.gpu
def test_gpu_overlapping_maps_wait_for_the_norm_before_them(cuda: torch.device, compiled: bool) -> None:
    """A chain x += W2 relu(W1 norm(x)), replayed on changing inputs, has the bits of calls one by one."""
    from kernels.add_layernorm import add_layernorm_int8

    if not compiled:
        pytest.skip("needs a GPU of compute capability 9.x")
    rows, d = 70, 1024
    norm_maps = [
        linear_inputs(LinearCase(rows, d, d, norm=True), cuda, torch.bfloat16, seed=i).map(int8=True) for i in range(4)
    ]
    plain_maps = [linear_inputs(LinearCase(rows, d, d), cuda, torch.bfloat16, seed=9 + i).map() for i in range(4)]
    x, y = (torch.empty(rows, d, dtype=torch.bfloat16, device=cuda) for _ in range(2))

    def chain(pause: bool) -> None:
        for (first, _), (second, bias) in zip(norm_maps, plain_maps, strict=True):
            steps: list[Callable[[], object]] = [
                lambda: add_layernorm_int8(x, None, None, None),
                lambda: small_linear(codes, first, relu=True, out=y, tiles=SPECIALIZED),  # noqa: B023 (called at once)
                lambda: small_linear(y, second, bias, residual=x, tiles=SPECIALIZED),  # noqa: B023
            ]
            codes: Any = steps[0]()
            for step in steps[1:]:
                if pause:
                    torch.cuda.synchronize()
                step()

    generator = torch.Generator(cuda).manual_seed(0)
    starts = [torch.randn(rows, d, device=cuda, generator=generator).bfloat16() for _ in range(5)]
    truths = []
    for start in starts:
        x.copy_(start)
        chain(pause=True)
        truths.append(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(pause=False)
    for turn in range(200):
        x.copy_(starts[turn % 5])
        graph.replay()
        assert torch.equal(x, truths[turn % 5])


COMPILE = """
import sys, torch
from kernels.compile_ahead import compile_kernel
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import int8_rows_jobs
capability = int(sys.argv[1])
choices = [LinearTiles(64, 128, 32)]
if capability == 90:
    shapes = ((128, 32), (64, 64))
    choices = [LinearTiles(n, 128, r, stages=4, prefetch=True, overlap=True, specialized=True) for n, r in shapes] + choices
options = {"integer": capability >= 80, "hopper": capability >= 90}
for tiles in choices:
    job = int8_rows_jobs(1024, 1024, tiles, torch.float16, **options)[0]
    print("KERNEL", compile_kernel(job, capability).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("capability", "products"),
    [
        (75, ["fma.rn.f32"]),
        (80, [".s32.s8.s8"]),
        (90, ["wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8", "aligned.m64n64k32.s32.s8.s8", ".s32.s8.s8"]),
    ],
)
def test_products_are_the_best_that_the_device_has(
    capability: int, products: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = subprocess.run([sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, check=True)
    kernels = found.stdout.split("KERNEL")[1:]
    assert len(kernels) == len(products)
    for ptx, product in zip(kernels, products, strict=True):
        assert product in ptx


def test_without_int8_products_codes_are_multiplied_as_floats(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.small_linear.int8_rows.major", lambda _: 7)
    case = LinearCase(17, 75, 96, int8=True, relu=True)
    assert check_int8_rows(case, cpu, torch.float32) <= LIMITS[torch.float32]


BARRIERS = """
import torch
from kernels.compile_ahead import compile_kernel
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import int8_rows_jobs
for stages in (8, 4):
    tiles = LinearTiles(64, 128, 32, stages=stages, overlap=True, specialized=True)
    print("KERNEL", compile_kernel(int8_rows_jobs(4096, 1024, tiles, hopper=True)[0], 90).asm["ptx"])
"""


def test_no_barrier_is_made_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # its memory is another's by the epilogue, and a barrier made there turned up among results
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = subprocess.run([sys.executable, "-c", BARRIERS], capture_output=True, text=True, check=True)
    whole, ring = found.stdout.split("KERNEL")[1:]
    assert whole.count("mbarrier.init") == 8  # all of K at once: nothing is filled again
    assert ring.count("mbarrier.init") == 2 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("br", [16, 32])
def test_gpu_many_programs_with_all_of_k_at_once(br: int, cuda: torch.device, compiled: bool) -> None:
    if not compiled:
        pytest.skip("needs a GPU of compute capability 9.x")
    weight, bias = linear_inputs(LinearCase(512, 4096, 1024), cuda, torch.bfloat16).map(int8=True)
    x = quantize_rows(linear_inputs(LinearCase(512, 4096, 1024), cuda, torch.bfloat16).x)
    truth = small_linear_reference(x, weight, bias, out_dtype=torch.bfloat16)
    tiles = LinearTiles(64, 128, br, stages=8, overlap=True, specialized=True)
    for _ in range(60):  # before its barriers were right, 52 to 60 of 60 such calls went wrong
        got = small_linear(x, weight, bias, tiles=tiles, dtype=torch.bfloat16)
        torch.testing.assert_close(got, truth, rtol=1e-2, atol=1e-2)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weight": torch.zeros(6, 32).half()}, "int8 rows go with int8 weights"),
    ({"x": quantize_rows(torch.zeros(3, 31))}, r"want contiguous int8\[R, 32\]"),
    ({"x": QuantizedRows(torch.zeros(3, 32, dtype=torch.int8), torch.ones(2))}, r"want contiguous float32\[3\]"),
    ({"bias": torch.zeros(6)}, r"want torch.float16\[6\]"),
    ({"dtype": None}, "pass out, residual or dtype"),
    ({"dtype": torch.int32}, "choose float32, float16 or bfloat16"),
    ({"out": torch.zeros(3, 5).half()}, r"out is .*\[3, 6\]"),
    ({"tiles": LinearTiles(library=True)}, "choose others"),
    ({"tiles": LinearTiles(split=2)}, "choose others"),
    ({"tiles": LinearTiles(4, br=1)}, "choose others"),
    ({"tiles": LinearTiles(16, 16, 16)}, "choose others"),
    ({"tiles": SPECIALIZED}, "compute capability 9.x"),
    ({"weight": Int8Linear(torch.zeros(32, 6, dtype=torch.int8).T, torch.ones(6))}, "weight must be contiguous"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": quantize_rows(torch.zeros(3, 32)), "weight": quantize_int8(torch.zeros(6, 32))}
    call: Callable[..., torch.Tensor] = small_linear
    with pytest.raises(ValueError, match=message):
        call(**(good | {"dtype": torch.float16} | change))


def test_a_folded_weight_keeps_its_own_bias_and_must_be_int8() -> None:
    sums = torch.zeros(6)
    x, bias = quantize_rows(torch.zeros(3, 32)), torch.zeros(6)
    with pytest.raises(ValueError, match="leave bias=None"):
        small_linear(x, FoldedLinear(quantize_int8(torch.zeros(6, 32)), sums, sums, 1e-5), bias, dtype=torch.float32)
    with pytest.raises(ValueError, match="int8 rows go with int8 weights"):
        small_linear(x, FoldedLinear(torch.zeros(6, 32), sums, sums, 1e-5), dtype=torch.float32)


def test_queries_are_of_the_dtype_of_the_cells() -> None:
    index, cells = torch.zeros(3, dtype=torch.int32), torch.zeros(4, 5, 2, 1, 2)
    with pytest.raises(ValueError, match=r"q_out is torch\.float16"):
        qkv_linear(
            quantize_rows(torch.zeros(3, 32)),
            quantize_int8(torch.zeros(6, 32)),
            None,
            cells,
            index,
            index,
            q_out=torch.zeros(3, 2).half(),
        )


def test_no_rows() -> None:
    x = QuantizedRows(torch.empty(0, 32, dtype=torch.int8), torch.empty(0))
    assert small_linear(x, quantize_int8(torch.ones(4, 32)), dtype=torch.bfloat16).shape == (0, 4)
