"""The router from products that the map before its norm has left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.route import FoldedRouter, fold_router, order_reference, route_products, route_reference
from kernels.row_products import RowProducts, chunk_products, split_in_thirds
from kernels.row_statistics import RowStatistics, chunk_statistics
from kernels.small_linear import LinearTiles, small_linear

TILES = LinearTiles(64, 128, 64, stages=5, prefetch=True, overlap=True, specialized=True)


def router_inputs(
    rows: int, features: int, experts: int, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, FoldedRouter]:
    """Raw rows whose mean is half their deviation, a router with its bias, and the same behind a norm."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight, bias = (draw(rows, features) + 0.5) * 3, draw(experts, features) * features**-0.5, draw(experts) * 0.1
    gamma, beta = (draw(features) * 0.2 + 1).bfloat16(), (draw(features) * 0.1).bfloat16()
    folded = fold_router(*(t.to(device) for t in (weight, bias, gamma, beta)), 1e-5)
    assert folded is not None
    return x.bfloat16().to(device), weight.to(device), bias.to(device), folded


def check_choice(
    x: torch.Tensor,
    products: RowProducts,
    statistics: RowStatistics,
    weight: torch.Tensor,
    bias: torch.Tensor,
    folded: FoldedRouter,
    top_k: int,
) -> None:
    """Norm, choices, gates and order against the norm in fp64 and what the router makes of it."""
    rows, experts = len(x), len(weight)
    active = torch.arange(rows, device=x.device) % 5 != 3
    options = {"top_k": top_k, "block_tokens": 16, "active": active, "gate_scale": 0.8}
    normed, routing = route_products(x, products, statistics, folded, **options)  # type: ignore[arg-type]
    wide = x.double()
    truth = torch.nn.functional.layer_norm(
        wide, wide.shape[1:], folded.norm_weight.double(), folded.norm_bias.double(), folded.eps
    )
    torch.testing.assert_close(normed.double(), truth, rtol=1.6e-2, atol=1.6e-2)
    want = route_reference(truth.float(), weight, router_bias=bias, **options)  # type: ignore[arg-type]
    logits = truth @ weight.double().T + bias.double()
    got, best = routing.expert_ids.long(), want.expert_ids.long()
    apart = (logits.gather(1, best.clamp(min=0)) - logits.gather(1, got.clamp(min=0)))[active]
    # the first choice is made among probabilities in bf16: those that round alike go to the lower number
    assert apart.numel() == 0 or apart.abs().max() < 0.04
    assert torch.equal(got[~active], best[~active])
    torch.testing.assert_close(routing.gate_weights, want.gate_weights, rtol=2e-2, atol=1e-2)
    ordered = order_reference(routing.expert_ids, routing.gate_weights, experts, x.shape[1], 16)
    assert torch.equal(routing.tokens_per_expert, ordered.tokens_per_expert)
    assert torch.equal(routing.scatter_index, ordered.scatter_index)
    assert int(routing.num_tiles) == int(ordered.num_tiles)
    assert not routing.sync.any()


@pytest.mark.parametrize("rows", [1, 3, 18])
@pytest.mark.parametrize(("features", "experts"), [(256, 16), (1024, 32), (512, 64)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_interpreter_matches_reference(rows: int, features: int, experts: int, top_k: int, cpu: torch.device) -> None:
    x, weight, bias, folded = router_inputs(rows, features, experts, cpu, rows + top_k)
    products = RowProducts(folded.thirds, chunk_products(x, folded.thirds))
    check_choice(x, products, RowStatistics(chunk_statistics(x), valid=True), weight, bias, folded, top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 65, 130, 320])
def test_the_map_leaves_products_and_changes_no_bit(rows: int, cuda: torch.device) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("specialized tiles are for Hopper")
    residual, weight, bias, folded = router_inputs(rows, 1024, 32, cuda, rows)
    generator = torch.Generator(cuda).manual_seed(rows)
    x, matrix, shift = (torch.randn(n, 1024, device=cuda, generator=generator).bfloat16() for n in (rows, 1024, 1))
    plain, mine = (RowStatistics.allocate(512, 1024, cuda) for _ in range(2))
    products, alone = RowProducts(folded.thirds), residual.clone()
    options = {"tiles": TILES, "bias": shift[0]}
    small_linear(x, matrix / 32, residual=alone, statistics=plain, **options)  # type: ignore[arg-type]
    small_linear(x, matrix / 32, residual=residual, statistics=mine, products=products, **options)  # type: ignore[arg-type]
    assert torch.equal(residual, alone)
    assert torch.equal(mine.chunks[:rows], plain.chunks[:rows])
    assert products.parts is not None
    torch.testing.assert_close(products.parts, chunk_products(residual, folded.thirds), rtol=1e-5, atol=2e-5)
    check_choice(residual, products, mine, weight, bias, folded, 2)


def test_other_tiles_leave_nothing(cpu: torch.device) -> None:
    x, _, _, folded = router_inputs(3, 256, 16, cpu, 0)
    products = RowProducts(folded.thirds, torch.zeros(4, 3, 16))
    small_linear(x, torch.zeros(256, 256).bfloat16(), residual=x.clone(), products=products)
    assert products.parts is None


def test_three_parts_are_the_fp32_vectors_exactly() -> None:
    vectors = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)
    parts = split_in_thirds(vectors).double().view(3, 16, 64)
    assert torch.equal(parts.sum(0).float(), vectors)


@pytest.mark.parametrize(
    ("experts", "features", "dtype"),
    [(5, 128, torch.bfloat16), (128, 128, torch.bfloat16), (16, 192, torch.bfloat16), (16, 128, torch.float16)],
)
def test_what_no_kernel_serves_is_not_folded(experts: int, features: int, dtype: torch.dtype) -> None:
    vector = torch.ones(features, dtype=dtype)
    assert fold_router(torch.zeros(experts, features), None, vector, vector, 1e-5) is None


def test_products_of_other_rows_are_refused(cpu: torch.device) -> None:
    x, _, _, folded = router_inputs(3, 256, 16, cpu, 0)
    statistics = RowStatistics(chunk_statistics(x), valid=True)
    options = {"top_k": 2, "block_tokens": 16}
    for parts in (None, torch.zeros(4, 4, 16), torch.zeros(4, 3, 32)):
        with pytest.raises(ValueError, match="products are not those of x"):
            route_products(x, RowProducts(folded.thirds, parts), statistics, folded, **options)  # type: ignore[arg-type]
    products, stale = RowProducts(folded.thirds, torch.zeros(4, 3, 16)), RowStatistics(chunk_statistics(x))
    with pytest.raises(ValueError, match="statistics are not those of x"):
        route_products(x, products, stale, folded, **options)  # type: ignore[arg-type]
    another = RowProducts(folded.thirds.clone(), torch.zeros(4, 3, 16))
    with pytest.raises(ValueError, match="products are with another router"):
        route_products(x, another, statistics, folded, **options)  # type: ignore[arg-type]
    for wrong in (x.half(), x.repeat_interleave(2, 1)[:, ::2]):
        with pytest.raises(ValueError, match="want contiguous bfloat16"):
            route_products(wrong, products, statistics, folded, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normed is"):
        route_products(x, products, statistics, folded, normed=x.float(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"want contiguous bf16\[3 E, D\]"):
        RowProducts(torch.zeros(15, 128).bfloat16())


def test_the_map_with_products_compiles_without_spills() -> None:
    """In a process of its own: here triton.jit means the interpreter."""
    code = """
import torch
from kernels.compile_ahead import compile_ahead
from kernels.route.jobs import route_jobs
from kernels.route.tiles import GateTiles
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import linear_jobs
tiles = LinearTiles(64, 128, 64, stages=5, prefetch=True, overlap=True, specialized=True)
jobs = [linear_jobs(1024, 1024, tiles, mode=1, hopper=True, chunks=True, products=n)[0] for n in (0, 16, 32, 64)]
jobs.append(route_jobs(1024, 32, 2, torch.bfloat16, GateTiles())[-1])
for job, result in zip(jobs, compile_ahead(jobs, 90, 1)):
    assert not result.error and result.spill_bytes == 0 and result.shared_bytes < 232448, (job[1], result)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
