import pytest
import torch

from kernels.add_layernorm import add_layernorm, add_slots
from kernels.checks import LAYERNORM_SIZES, LIMITS, check_add_layernorm


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
