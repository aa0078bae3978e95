import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.linear_checks import (
    QKV_SIZES,
    QKV_TILES,
    LinearCase,
    check_qkv_linear,
    check_small_linear,
    linear_cases,
    linear_inputs,
)
from kernels.small_linear import (
    Int8Linear,
    LinearScratch,
    LinearTiles,
    linear_scratch,
    qkv_linear,
    quantize_int8,
    small_linear,
)
from kernels.small_linear.jobs import linear_jobs
from kernels.small_linear.tiles import default_tiles

CASES = linear_cases(large=False)


def gpu_case(case: LinearCase, dtype: torch.dtype) -> LinearCase:
    if dtype == torch.float32 and case.tiles is not None and not case.tiles.library:
        t = case.tiles  # twice the bytes
        return dataclasses.replace(case, tiles=dataclasses.replace(t, bk=max(16, t.bk // 4), warps=max(4, t.warps)))
    return case


# fp16 and fp32 are other types in the same kernels: every fifth case meets each launch form and size
GPU_CASES = [(case, torch.bfloat16) for case in linear_cases(large=True)]
GPU_CASES += [(gpu_case(c, d), d) for d in (torch.float16, torch.float32) for c in linear_cases(large=True)[::5]]


def case_name(value: object) -> str:
    return value.name if isinstance(value, LinearCase) else str(value)


@pytest.fixture(scope="module")
def compiled(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> None:
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    jobs: dict[str, Job] = {}
    for c, dtype in GPU_CASES:
        bits = 8 if c.int8 else 32 if dtype == torch.float32 else 16
        tiles = c.tiles or default_tiles(c.n, c.k, c.rows, bits, fixed=False)
        flags = {"norm": c.norm, "relu": c.relu, "int8": c.int8, "hopper": hopper}
        for job in linear_jobs(c.n, c.k, tiles, dtype, mode=int(c.residual), **flags):
            jobs[repr(job)] = job
    compile_first(list(jobs.values()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_interpreter_matches_fp64(case: LinearCase, cpu: torch.device) -> None:
    dtype = torch.float16 if CASES.index(case) % 2 else torch.float32
    assert check_small_linear(case, cpu, dtype) <= LIMITS[dtype]


@pytest.mark.parametrize("sizes", QKV_SIZES, ids=str)
@pytest.mark.parametrize("tiles", QKV_TILES, ids=str)
def test_qkv_interpreter_matches_fp64(sizes: tuple[int, int, int], tiles: LinearTiles | None, cpu: torch.device) -> None:
    int8 = sizes[0] == 9 and not (tiles is not None and tiles.library)
    dtype = torch.float16 if sizes[0] == 17 else torch.float32
    assert check_qkv_linear(*sizes, tiles, cpu, dtype, int8=int8) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), GPU_CASES, ids=case_name)
@pytest.mark.usefixtures("compiled")
def test_gpu_matches_fp64(case: LinearCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_small_linear(case, cuda, dtype) <= max(LIMITS[dtype], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", (*QKV_SIZES, (320, 1024, 1024), (64, 2048, 2048)), ids=str)
@pytest.mark.parametrize("tiles", QKV_TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_qkv_gpu_matches_fp64(
    sizes: tuple[int, int, int], tiles: LinearTiles | None, dtype: torch.dtype, cuda: torch.device
) -> None:
    for int8 in (False,) if tiles is not None and tiles.library else (False, True):
        assert check_qkv_linear(*sizes, tiles, cuda, dtype, int8=int8) <= LIMITS[dtype]


def test_residual_is_updated_in_place_with_one_rounding(cpu: torch.device) -> None:
    x, weight = torch.ones(2, 16).half(), torch.full((16, 16), 1 / 16 * 1.0005).half()
    residual = torch.full((2, 16), 2048.0).half()  # steps of 2: what rounds once and what rounds twice differ
    residual[1] = 1.0
    exact = residual.double() + (x.double() @ weight.double().T)
    got = small_linear(x, weight, residual=residual)
    assert got is residual
    assert torch.equal(residual, exact.half())


def test_fp16_saturates_as_nllb_clamps(cpu: torch.device) -> None:
    x = torch.full((3, 16), 100.0).half()
    weight = torch.full((4, 16), 60.0).half()
    weight[1] = -60.0
    weight[2] = 1.0
    weight[3] = float("nan")
    for tiles in (None, LinearTiles(library=True), LinearTiles(16, 16, 16, split=2)):
        out = small_linear(x, weight, tiles=tiles)
        assert out[0, :3].tolist() == [64512.0, -64512.0, 1600.0]  # 65504 - 1000 as fp16 rounds it
        assert out[:, 3].isnan().all()


def test_int8_gives_the_dequantized_product_exactly(cpu: torch.device) -> None:
    # Integers and powers of two: every sum is exact, so any wrong code, scale or order shows.
    codes = torch.randint(-127, 128, (33, 70), dtype=torch.int8)
    codes[0, :2] = torch.tensor([-127, 127])
    weight = Int8Linear(codes, 2.0 ** torch.randint(-3, 4, (33,)))
    x, bias = torch.randint(-8, 9, (5, 70)).float(), torch.randint(-4, 5, (33,)).float()
    truth = functional.linear(x, weight.dequantized(), bias)
    for tiles in (None, LinearTiles(16, 16, 16, split=3), LinearTiles(64, 64, 32)):
        assert torch.equal(small_linear(x, weight, bias, tiles=tiles), truth)


def test_quantization_keeps_every_channel_within_half_a_step() -> None:
    weight = torch.randn(20, 50) * torch.logspace(-4, 4, 20)[:, None]
    weight[3] = 0.0
    packed = quantize_int8(weight)
    assert packed.codes.abs().amax(dim=1).tolist() == [0 if i == 3 else 127 for i in range(20)]
    assert ((packed.dequantized() - weight).abs() <= packed.scales[:, None] * 0.5001).all()


def bits_depend_on_the_row_alone(device: torch.device, dtype: torch.dtype, n: int, k: int) -> bool:
    """Rows computed in batches of 1 to 40, among other mates, in fixed mode."""
    inputs = linear_inputs(LinearCase(40, n, k, norm=True), device, dtype)
    same = True
    for int8 in (False, True):
        weight, bias = inputs.map(int8=int8)
        whole = small_linear(inputs.x, weight, bias, fixed=True)
        for first, last in ((0, 1), (5, 8), (3, 20), (17, 40)):
            mates = inputs.x[first:last].clone()
            part = small_linear(mates, weight, bias, fixed=True)
            same &= torch.equal(part, whole[first:last])
            mates[0] = float("inf")
            part = small_linear(mates, weight, bias, fixed=True)
            same &= torch.equal(part[1:], whole[first + 1 : last])
    return same


@pytest.mark.filterwarnings("ignore:invalid value")
def test_batch_composition_does_not_change_bits(cpu: torch.device) -> None:
    assert bits_depend_on_the_row_alone(cpu, torch.float32, 75, 131)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(75, 131), (3072, 1024), (1024, 4096)], ids=str)
def test_gpu_batch_composition_does_not_change_bits(shape: tuple[int, int], cuda: torch.device) -> None:
    assert bits_depend_on_the_row_alone(cuda, torch.bfloat16, *shape)


@pytest.mark.parametrize("mode", ["out", "residual", "qkv"])
def test_a_split_of_many_rows_goes_in_several_launches(
    mode: str, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.small_linear.scratch.SPLIT_ROWS", 16)
    monkeypatch.setattr("kernels.small_linear.launcher.SPLIT_ROWS", 16)
    tiles = LinearTiles(16, 16, 16, split=2)
    if mode == "qkv":
        assert check_qkv_linear(37, 16, 40, tiles, cpu, torch.float32) <= LIMITS[torch.float32]
    else:
        case = LinearCase(37, 24, 40, tiles, norm=True, residual=mode == "residual")
        assert check_small_linear(case, cpu, torch.float32) <= LIMITS[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [
        None,
        LinearTiles(32, 128, 32, split=4),
        LinearTiles(32, 128, 32, fuse_norm=False),
        LinearTiles(16, 256, 16, prefetch=True),
        LinearTiles(16, 256, 16, prefetch=True, overlap=True),
        LinearTiles(32, 128, 32, split=4, overlap=True),
        LinearTiles(64, 64, 64, gram=True, overlap=True),
        LinearTiles(4, br=4, overlap=True),
        LinearTiles(library=True),
    ],
    ids=str,
)
def test_gpu_graph_replays_with_changing_inputs(tiles: LinearTiles | None, cuda: torch.device) -> None:
    rows, d = 40, 1024
    inputs = linear_inputs(LinearCase(rows, 3 * d, d, norm=True), cuda, torch.bfloat16)
    out_weight = linear_inputs(LinearCase(rows, d, d), cuda, torch.bfloat16, seed=1).weight
    x = torch.empty(rows, d, dtype=torch.bfloat16, device=cuda)
    residual, cells = torch.empty_like(x), torch.zeros(rows, 4, 2, 8, d // 8, dtype=x.dtype, device=cuda)
    index, positions = (torch.zeros(rows, dtype=torch.int32, device=cuda) for _ in range(2))
    weight, bias = inputs.map()
    shapes = [(3 * d, d, True), (d, d, False)]
    scratch = linear_scratch(shapes, rows, x.dtype, cuda)
    if tiles is not None:
        scratch = LinearScratch(
            torch.empty(rows * 2, device=cuda),
            torch.empty(rows * 3 * d, dtype=x.dtype, device=cuda),
            torch.empty(4 * rows * (3 * d + 2), device=cuda),
            torch.zeros(1000, dtype=torch.int32, device=cuda),
        )

    def step() -> torch.Tensor:
        residual.copy_(x)
        q = qkv_linear(x, weight, bias, cells, index, positions, tiles=tiles, scratch=scratch)
        return small_linear(q, out_weight, residual=residual, tiles=tiles, scratch=scratch)

    x.normal_()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(rows, d, generator=generator))
        index.copy_(torch.randperm(rows, generator=generator) - 1)
        positions.copy_(torch.randint(0, 4, (rows,), generator=generator))
        cells.zero_()
        before = torch.cuda.memory_allocated()
        graph.replay()
        assert torch.cuda.memory_allocated() == before
        got, got_cells = captured.clone(), cells.clone()
        cells.zero_()
        assert torch.equal(got, step())
        assert torch.equal(got_cells, cells)
