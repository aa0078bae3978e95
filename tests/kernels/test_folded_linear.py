import pytest
import torch
from torch.nn import functional

from kernels.checks import LIMITS
from kernels.small_linear import (
    FoldedLinear,
    LinearTiles,
    fold_norm,
    quantize_int8,
    small_linear,
    small_linear_reference,
)
from kernels.testing import relative_error

FORMS = [
    LinearTiles(16, 64, 16),
    LinearTiles(16, 32, 32, split=3),
    LinearTiles(32, 32, 16, fuse_norm=False),
    LinearTiles(4, br=2),
    LinearTiles(library=True),
]

IN_16_BITS = [LinearTiles(8, br=4), LinearTiles(64, 128, 64, gram=True), LinearTiles(32, 64, 64, split=2, gram=True)]


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
    for tiles in (LinearTiles(64, 128, 32), LinearTiles(64, 128, 32, split=4), *IN_16_BITS, LinearTiles(library=True)):
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
    for tiles in (*FORMS, *IN_16_BITS):
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
