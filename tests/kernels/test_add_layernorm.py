import pytest
import torch

from kernels.add_layernorm import add_layernorm, add_layernorm_int8, add_layernorm_int8_reference, add_slots
from kernels.checks import LIMITS
from kernels.layernorm_checks import LAYERNORM_SIZES, check_add_layernorm
from kernels.quantized_rows import QuantizedRows


@pytest.mark.parametrize("sizes", LAYERNORM_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreter_matches_reference(sizes: tuple[int, int, int], dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_add_layernorm(*sizes, cpu, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", (*LAYERNORM_SIZES, (320, 2048, 2), (1, 1024, 1)), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_matches_reference(sizes: tuple[int, int, int], dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_add_layernorm(*sizes, cuda, dtype) <= LIMITS[dtype]


def test_matches_torch_layer_norm(cpu: torch.device) -> None:
    residual, weight, bias = torch.randn(4, 96), torch.randn(96), torch.randn(96)
    _, out = add_layernorm(residual.clone(), None, weight, bias, eps=1e-5)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(residual, (96,), weight, bias))


def test_wrong_delta_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="delta is"):
        add_layernorm(torch.zeros(4, 8), torch.zeros(4, 7), torch.zeros(8), torch.zeros(8))


def test_strided_residual_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        add_layernorm(torch.zeros(8, 4).T, None, torch.zeros(8), torch.zeros(8))


def test_the_add_alone_takes_rows_of_several_blocks(cpu: torch.device) -> None:
    residual, delta = torch.randn(2, 1500), torch.randn(2, 1500)
    assert torch.equal(add_slots(residual.clone(), delta), residual + delta)


@pytest.mark.parametrize("delta", [torch.zeros(4, 7), torch.zeros(4, 2, 8).transpose(0, 1)], ids=["features", "strided"])
def test_the_add_alone_refuses_a_wrong_delta(delta: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="delta is"):
        add_slots(torch.zeros(4, 8), delta)


def check_int8(rows: int, features: int, slots: int, affine: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Same residual bits; codes one off where a value lies between two, scales to fp32's last digits."""
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    residual = (draw(rows, features) * 3 + 20).to(dtype)
    delta = draw(rows, slots, features).to(dtype) if slots else None
    ids = torch.randint(-1, 3, (rows, slots), generator=generator, device=device, dtype=torch.int32) if slots else None
    if delta is not None and ids is not None:
        delta[ids < 0] = float("nan")  # what nobody wrote
    weight, bias = (draw(features).to(dtype), draw(features).to(dtype)) if affine else (None, None)
    new, truth = add_layernorm_int8_reference(residual, delta, weight, bias, expert_ids=ids)
    got = add_layernorm_int8(residual, delta, weight, bias, expert_ids=ids)
    assert torch.equal(residual, new)
    assert got.codes.dtype == torch.int8
    torch.testing.assert_close(got.scales, truth.scales, rtol=1e-5, atol=0.0)
    difference = (got.codes.int() - truth.codes.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() <= 1e-3


@pytest.mark.parametrize("sizes", LAYERNORM_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_int8_rows_match_reference(sizes: tuple[int, int, int], dtype: torch.dtype, affine: bool, cpu: torch.device) -> None:
    check_int8(*sizes, affine, cpu, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", (*LAYERNORM_SIZES, (320, 2048, 2), (320, 1024, 0), (1, 1024, 1)), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_gpu_int8_rows_match_reference(
    sizes: tuple[int, int, int], dtype: torch.dtype, affine: bool, cuda: torch.device
) -> None:
    check_int8(*sizes, affine, cuda, dtype)


def rows_of_all_kinds(device: torch.device) -> None:
    x = torch.randn(6, 100, device=device)
    x[0], x[1, 3], x[2, 99], x[3] = 0.0, float("nan"), float("-inf"), 7.0
    x[4] *= 1e-3
    got = add_layernorm_int8(x, None, None, None, eps=1e-5)
    assert got.scales.isnan().tolist() == [False, True, True, False, False, False]
    assert got.codes[0].eq(0).all()
    assert got.scales[0] == 1.0
    assert got.dequantize()[3].abs().max() <= 1e-3  # the mean of equal values may be a rounding off
    weight, bias = torch.ones(100, device=device), torch.zeros(100, device=device)
    weight[50] = float("nan")
    assert add_layernorm_int8(x, None, weight, bias).scales.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_int8_rows_of_zeros_and_rows_not_finite(cpu: torch.device) -> None:
    rows_of_all_kinds(cpu)


@pytest.mark.gpu
def test_gpu_int8_rows_of_zeros_and_rows_not_finite(cuda: torch.device) -> None:
    rows_of_all_kinds(cuda)


def test_int8_rows_refuse_what_does_not_belong_together() -> None:
    x, vector = torch.zeros(4, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="give both or neither"):
        add_layernorm_int8(x, None, vector, None)
    with pytest.raises(ValueError, match=r"must be \[8\]"):
        add_layernorm_int8(x, None, torch.zeros(7), vector)
    with pytest.raises(ValueError, match="delta is"):
        add_layernorm_int8(x, torch.zeros(4, 7), None, None)
    with pytest.raises(ValueError, match="out has 3 rows"):
        add_layernorm_int8(x, None, None, None, out=QuantizedRows(torch.zeros(3, 8, dtype=torch.int8), torch.zeros(3)))
