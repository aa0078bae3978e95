import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from kernels.checks import LIMITS
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
    FoldedLinear,
    Int8Linear,
    LinearScratch,
    LinearTiles,
    fold_norm,
    linear_scratch,
    qkv_linear,
    quantize_int8,
    small_linear,
    small_linear_reference,
)
from kernels.small_linear.tiles import default_tiles, select_tiles
from kernels.testing import relative_error

CASES = linear_cases(large=False)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", linear_cases(large=True), ids=lambda c: c.name)
def test_gpu_matches_fp64(case: LinearCase, dtype: torch.dtype, cuda: torch.device) -> None:
    if dtype == torch.float32 and case.tiles is not None and not case.tiles.library:
        t = case.tiles  # twice the bytes
        case = dataclasses.replace(case, tiles=dataclasses.replace(t, bk=max(16, t.bk // 4), warps=max(4, t.warps)))
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


FORMS = [
    LinearTiles(16, 64, 16),
    LinearTiles(16, 32, 32, split=3),
    LinearTiles(32, 32, 16, fuse_norm=False),
    LinearTiles(library=True),
]


@pytest.mark.parametrize("tiles", [None, *FORMS], ids=str)
def test_matches_torch_layer_norm_linear_relu(tiles: LinearTiles | None, cpu: torch.device) -> None:
    x, weight, bias, scale, shift = (torch.randn(*s) for s in ((7, 96), (40, 96), (40,), (96,), (96,)))
    out = small_linear(x, fold_norm(weight, bias, scale, shift, 1e-5), relu=True, tiles=tiles)
    truth = functional.linear(functional.layer_norm(x, (96,), scale, shift), weight, bias).relu()
    torch.testing.assert_close(out, truth)


def rows_and_norm(rows: int, k: int, n: int, dtype: torch.dtype, *, mean: float) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, norm weight, norm bias, from one seed: what is compared with a limit must not vary."""
    generator = torch.Generator().manual_seed(7)
    x, w, b, scale, shift = (torch.randn(*s, generator=generator) for s in ((rows, k), (n, k), (n,), (k,), (k,)))
    drawn = (x + mean, w * k**-0.5, b, 1 + 0.3 * scale, 0.3 * shift)
    return tuple(t.to(dtype) for t in drawn)


def plain_norm_linear(x: torch.Tensor, *weights: torch.Tensor, dtype: torch.dtype, between: torch.dtype) -> torch.Tensor:
    """torch's layer norm and linear in `dtype`; the normed rows rounded to `between`, as an unfolded path stores them."""
    weight, bias, scale, shift = (w.to(dtype) for w in weights)
    normed = functional.layer_norm(x.to(dtype), x.shape[1:], scale, shift, 1e-5).to(between)
    return functional.linear(normed.to(dtype), weight, bias)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("tiles", FORMS, ids=str)
def test_a_large_mean_costs_no_digits(tiles: LinearTiles, mean: float, cpu: torch.device) -> None:
    x, *weights = rows_and_norm(5, 700, 24, torch.float32, mean=mean)
    x[0, 0] = -1000.0  # an outlier where the kernel looks for a value near the mean
    truth = plain_norm_linear(x, *weights, dtype=torch.float64, between=torch.float64)
    out = small_linear(x, fold_norm(*weights, 1e-5), tiles=tiles)
    for row in range(5):
        assert relative_error(out[row], truth[row]) <= LIMITS[torch.float32]


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_folding_is_no_less_exact_than_rounding_the_normed_rows(mean: float, cpu: torch.device) -> None:
    x, *weights = rows_and_norm(20, 600, 200, torch.float16, mean=mean)
    truth = plain_norm_linear(x, *weights, dtype=torch.float64, between=torch.float64)
    unfolded = plain_norm_linear(x, *weights, dtype=torch.float64, between=torch.float16).half()
    folded = fold_norm(*weights, 1e-5)
    for tiles in (LinearTiles(64, 128, 32), LinearTiles(64, 128, 32, split=4), LinearTiles(library=True)):
        assert relative_error(small_linear(x, folded, tiles=tiles), truth) <= 1.05 * relative_error(unfolded, truth)


def test_int8_of_the_folded_map_loses_little_where_gammas_are_alike() -> None:
    x, *weights = rows_and_norm(20, 600, 200, torch.float32, mean=0.0)
    truth = plain_norm_linear(x, *weights, dtype=torch.float64, between=torch.float64)
    codes = quantize_int8(weights[0]).dequantized()
    plain = plain_norm_linear(x, codes, *weights[1:], dtype=torch.float64, between=torch.float64)
    folded = small_linear_reference(x, fold_norm(*weights, 1e-5, int8=True))
    assert relative_error(folded, truth) <= 1.3 * relative_error(plain, truth)


def test_rows_of_one_value_give_the_bias(cpu: torch.device) -> None:
    _, *weights = rows_and_norm(1, 96, 40, torch.float32, mean=0.0)
    folded = fold_norm(*weights, 1e-5)
    for tiles in FORMS:
        torch.testing.assert_close(small_linear(torch.full((3, 96), 7.0), folded, tiles=tiles), folded.bias.expand(3, -1))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_broken_row_stays_alone(cpu: torch.device) -> None:
    x, *weights = rows_and_norm(6, 70, 20, torch.float16, mean=1.0)
    folded = fold_norm(*weights, 1e-5)
    for tiles in FORMS:
        whole = small_linear(x, folded, tiles=tiles)
        for value in (float("nan"), float("inf")):
            broken = x.clone()
            broken[2, 5] = value
            out = small_linear(broken, folded, tiles=tiles)
            assert out[2].isnan().all()
            assert torch.equal(out[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]])


def test_bad_norms_are_not_folded() -> None:
    weight, ones = torch.full((4, 8), 300.0).half(), torch.ones(8)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16: use bfloat16"):
        fold_norm(weight, None, ones * 300, ones, 1e-5)
    with pytest.raises(ValueError, match="not finite in int8"):
        fold_norm(weight, None, ones * float("nan"), ones, 1e-5, int8=True)
    with pytest.raises(ValueError, match=r"want \[8\]"):
        fold_norm(weight, None, torch.ones(7), ones, 1e-5)
    with pytest.raises(ValueError, match=r"bias is \[3\]; want \[4\]"):
        fold_norm(weight, torch.ones(3), ones, ones, 1e-5)
    with pytest.raises(ValueError, match=r"column_sums is .*float32\[4\]"):
        FoldedLinear(weight, torch.ones(5), torch.ones(4), 1e-5)


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


def test_fixed_tiles_do_not_look_at_the_rows(cpu: torch.device) -> None:
    for n, k in ((1024, 1024), (8192, 2048), (77, 33)):
        chosen = {select_tiles(n, k, rows, 16, cpu, norm=True, fixed=True) for rows in (1, 16, 17, 320, 4096)}
        assert len(chosen) == 1
        assert not chosen.pop().library  # a library may choose its order by the number of rows


@pytest.mark.parametrize("fused", [True, False])
def test_scratch_is_enough_and_semaphores_return_to_zero(
    fused: bool, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split_everything(*_: object, **__: object) -> LinearTiles:
        return LinearTiles(16, 16, 16, split=3, fuse_norm=fused)

    monkeypatch.setattr("kernels.small_linear.scratch.select_tiles", split_everything)
    monkeypatch.setattr("kernels.small_linear.launcher.select_tiles", split_everything)
    scratch = linear_scratch([(48, 64, True), (33, 100, True)], 20, torch.float32, cpu)
    for n, k, rows in ((48, 64, 20), (33, 100, 3), (48, 64, 17)):
        inputs = linear_inputs(LinearCase(rows, n, k, norm=True), cpu, torch.float32)
        got = small_linear(inputs.x, *inputs.map(), scratch=scratch)
        assert torch.equal(got, small_linear(inputs.x, *inputs.map()))
        assert not scratch.semaphores.any()
    with pytest.raises(ValueError, match="make it with linear_scratch"):
        small_linear(torch.zeros(21, 100), torch.zeros(48, 100), scratch=scratch)


@pytest.mark.parametrize("rows", [1, 17, 70])
def test_default_tiles_fit_every_shape(rows: int) -> None:
    for n, k in ((1, 1), (1024, 1024), (8192, 2048)):
        for bits in (8, 16, 32):
            tiles = default_tiles(n, k, rows, bits, fixed=False)
            assert not (tiles.library and bits == 8)


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


def test_no_rows(cpu: torch.device) -> None:
    assert small_linear(torch.empty(0, 8), torch.ones(4, 8)).shape == (0, 4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 7)}, r"weight is \[6, 8\]; x wants \[N, 7\]"),
    ({"x": torch.zeros(8, 3).T}, r"want contiguous \[R, K\]"),
    ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "choose float32, float16 or bfloat16"),
    ({"weight": torch.zeros(6, 8).half()}, "convert one of them"),
    ({"weight": torch.zeros(8, 6).T}, "weight must be contiguous"),
    ({"bias": torch.zeros(5)}, r"bias is .*want torch.float32\[6\]"),
    ({"weight": fold_norm(torch.ones(6, 8), None, torch.ones(8), torch.ones(8), 1e-5)}, "leave bias=None"),
    ({"out": torch.zeros(3, 5)}, r"out is .*\[3, 6\]"),
    ({"residual": torch.zeros(3, 6).half()}, "residual is torch.float16"),
    ({"residual": torch.zeros(3, 6), "out": torch.zeros(3, 6)}, "leave out=None"),
    ({"weight": quantize_int8(torch.ones(6, 8)), "tiles": LinearTiles(library=True)}, "choose tiles with library=False"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)}
    call: Callable[..., torch.Tensor] = small_linear
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


def test_x_is_not_overwritten_while_others_read_it() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="memory of its own"):
        small_linear(x, torch.zeros(8, 8), residual=x)


BAD_QKV: list[tuple[dict[str, Any], str]] = [
    ({"weight": torch.zeros(7, 8)}, r"want 3 \* D"),
    ({"cells": torch.zeros(4, 5, 2, 1, 3)}, r"H \* Dh = 2"),
    ({"cells": torch.zeros(4, 5, 2, 2, 1).transpose(0, 1)}, "one layer of the cache"),
    ({"cells": torch.zeros(4, 5, 2, 1, 2).half()}, "allocate the cache in x's dtype"),
    ({"rows": torch.zeros(3)}, r"rows is .*int32\[3\]"),
    ({"positions": torch.zeros(4, dtype=torch.int32)}, r"positions is .*int32\[3\]"),
    ({"q_out": torch.zeros(3, 6)}, r"q_out is .*\[3, 2\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_QKV)
def test_bad_cache_is_refused(change: dict[str, Any], message: str) -> None:
    index = torch.zeros(3, dtype=torch.int32)
    good = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(6, 8),
        "bias": torch.zeros(6),
        "cells": torch.zeros(4, 5, 2, 1, 2),
        "rows": index,
        "positions": index,
    }
    call: Callable[..., torch.Tensor] = qkv_linear
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@pytest.mark.parametrize("bad", [{"bn": 24}, {"bk": 1024}, {"br": 8}, {"split": 0}, {"prefetch": True, "split": 2}])
def test_impossible_tiles_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose|cannot go with"):
        LinearTiles(**bad)


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
