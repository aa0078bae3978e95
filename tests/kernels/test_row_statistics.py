import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kernels.add_layernorm import add_slots
from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.embed import embed
from kernels.linear_checks import LinearCase, linear_inputs
from kernels.row_statistics import RowStatistics, chunk_statistics
from kernels.small_linear import LinearTiles, qkv_linear, qkv_linear_reference, small_linear
from kernels.small_linear.jobs import linear_jobs
from kernels.testing import relative_error

TILES = LinearTiles(64, 128, 64, stages=4, fuse_norm=False, overlap=True, specialized=True)
SPECIALIZED = [
    TILES,
    replace(TILES, br=16),
    replace(TILES, bn=128, bk=64, br=32, fuse_norm=True),
    replace(TILES, bn=256, bk=64, warps=8),
    replace(TILES, bn=128, br=128, bk=64, warps=8),
]


def fresh(rows: int, features: int, device: torch.device) -> RowStatistics:
    """Poisoned statistics of one row more than there are; their last row must stay NaN."""
    statistics = RowStatistics.allocate(rows + 1, features, device)
    statistics.chunks.fill_(float("nan"))
    return statistics


def check_left(statistics: RowStatistics, rows: torch.Tensor) -> None:
    """What was left is of these rows, as they are stored."""
    truth = chunk_statistics(rows)
    assert statistics.valid
    torch.testing.assert_close(statistics.chunks[:-1], truth, rtol=2e-5, atol=2e-5)
    assert statistics.chunks[-1].isnan().all()


def check_writers(device: torch.device, dtype: torch.dtype, features: int) -> None:
    rows = 5
    generator = torch.Generator(device).manual_seed(features)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 3 + 20).to(dtype)

    statistics = fresh(rows, features, device)
    residual, delta = draw(rows, features), draw(rows, 2, features)
    plain = add_slots(residual.clone(), delta)
    assert torch.equal(add_slots(residual, delta, statistics=statistics), plain)
    check_left(statistics, residual)
    table, sines = draw(40, features), draw(30, features)
    ids = torch.arange(rows, device=device, dtype=torch.int32)
    options = {"scale": math.sqrt(features), "pad_token_id": 1}
    plain = embed(ids, ids, table, sines, **options)  # type: ignore[arg-type]
    statistics = fresh(rows, features, device)
    assert torch.equal(embed(ids, ids, table, sines, statistics=statistics, **options), plain)  # type: ignore[arg-type]
    check_left(statistics, plain)


@pytest.mark.parametrize("features", [256, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_expert_sums_and_embeddings_leave_statistics(features: int, dtype: torch.dtype, cpu: torch.device) -> None:
    check_writers(cpu, dtype, features)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [256, 1024, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_expert_sums_and_embeddings_leave_statistics(features: int, dtype: torch.dtype, cuda: torch.device) -> None:
    check_writers(cuda, dtype, features)


@pytest.mark.parametrize("features", [192, 128, 200, 65])
def test_features_that_no_kernel_joins_leave_nothing(features: int, cpu: torch.device) -> None:
    statistics = fresh(3, features, cpu)
    statistics.valid = True
    add_slots(torch.zeros(3, features), torch.zeros(3, features), statistics=statistics)
    assert not statistics.valid
    assert statistics.chunks.isnan().all()


def test_other_tiles_clear_statistics_of_a_residual_and_ignore_those_of_rows(cpu: torch.device) -> None:
    inputs = linear_inputs(LinearCase(3, 256, 256, norm=True), cpu, torch.float32)
    statistics = fresh(3, 256, cpu)
    statistics.valid = True  # and NaN: whoever read them would show
    folded, _ = inputs.map()
    plain = small_linear(inputs.x, folded)
    assert torch.equal(small_linear(inputs.x, folded, statistics=statistics), plain)
    assert statistics.valid
    small_linear(inputs.x, inputs.weight, residual=plain, statistics=statistics)
    assert not statistics.valid


def test_statistics_of_another_shape_are_refused(cpu: torch.device) -> None:
    for statistics in (fresh(1, 256, cpu), fresh(3, 512, cpu)):
        with pytest.raises(ValueError, match=r"want contiguous \[at least 3, 2, 4\]"):
            add_slots(torch.zeros(3, 256), torch.zeros(3, 256), statistics=statistics)


@pytest.fixture(scope="module")
def hopper(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> torch.device:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.x")
    jobs: list[Job] = []
    for dtype in (torch.bfloat16, torch.float16):
        for tiles in SPECIALIZED:
            jobs += linear_jobs(1024, 1024, tiles, dtype, norm=True, hopper=True, chunks=True)
            jobs += linear_jobs(3072, 1024, tiles, dtype, norm=True, mode=2, hopper=True, chunks=True)
            jobs += linear_jobs(1024, 1024, tiles, dtype, mode=1, hopper=True, chunks=True)
    compile_first(jobs)
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", SPECIALIZED, ids=str)
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_gpu_linear_map_leaves_statistics_of_the_residual(
    rows: int, tiles: LinearTiles, dtype: torch.dtype, hopper: torch.device
) -> None:
    inputs = linear_inputs(LinearCase(rows, 1024, 1024, residual=True), hopper, dtype)
    assert inputs.residual is not None
    residual, statistics = inputs.residual * 2 + 7, fresh(rows, 1024, hopper)
    plain = small_linear(inputs.x, inputs.weight, inputs.bias, residual=residual.clone(), tiles=tiles)
    small_linear(inputs.x, inputs.weight, inputs.bias, residual=residual, tiles=tiles, statistics=statistics)
    assert torch.equal(residual, plain)
    check_left(statistics, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", SPECIALIZED, ids=str)
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_gpu_linear_map_reads_them(rows: int, tiles: LinearTiles, dtype: torch.dtype, hopper: torch.device) -> None:
    """Rows far from zero; and statistics that are not of x change the result: the map has them from nowhere else."""
    inputs = linear_inputs(LinearCase(rows, 1024, 1024, norm=True), hopper, dtype)
    folded, _ = inputs.map()
    statistics = fresh(rows, 1024, hopper)
    statistics.chunks[:-1], statistics.valid = chunk_statistics(inputs.x), True
    out = small_linear(inputs.x, folded, tiles=tiles, statistics=statistics)
    assert relative_error(out, inputs.truth()) <= LIMITS[dtype]
    statistics.chunks[:-1, 1] *= 4
    other = small_linear(inputs.x, folded, tiles=tiles, statistics=statistics)
    assert not torch.equal(out, other)


@pytest.mark.gpu
def test_gpu_queries_keys_and_values_by_statistics(hopper: torch.device) -> None:
    rows = 70
    inputs = linear_inputs(LinearCase(rows, 3072, 1024, norm=True), hopper, torch.bfloat16)
    folded, _ = inputs.map()
    cells = torch.zeros(rows, 5, 2, 16, 64, dtype=torch.bfloat16, device=hopper)
    cell_rows = torch.randperm(rows, device=hopper).int()
    positions = torch.randint(0, 5, (rows,), device=hopper, dtype=torch.int32)
    statistics = fresh(rows, 1024, hopper)
    statistics.chunks[:-1], statistics.valid = chunk_statistics(inputs.x), True
    truth, true_cells = qkv_linear_reference(inputs.x, folded, None, cells, cell_rows, positions)
    queries = qkv_linear(inputs.x, folded, None, cells, cell_rows, positions, tiles=SPECIALIZED[2], statistics=statistics)
    assert relative_error(queries, truth) <= LIMITS[torch.bfloat16]
    assert relative_error(cells, true_cells) <= LIMITS[torch.bfloat16]
