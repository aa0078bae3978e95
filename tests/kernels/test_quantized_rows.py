import math

import pytest
import torch

from kernels.quantized_rows import QuantizedRows, check_quantized, quantize_rows


def test_codes_and_scales_worked_out_by_hand() -> None:
    rows = quantize_rows(torch.tensor([[254.0, -127.0, 1.0, 3.0, 5.0], [0.0, 0.5, -0.25, 0.0, 0.0]]))
    assert rows.scales.tolist() == [2.0, torch.tensor(0.5 / 127).item()]
    assert rows.codes.dtype == torch.int8
    assert rows.codes[0].tolist() == [127, -64, 0, 2, 2]  # -63.5, 0.5, 1.5 and 2.5 go to the even neighbour
    assert rows.codes[1].tolist() == [0, 127, -64, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_value_is_within_half_a_step(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 77) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    rows = quantize_rows(x)
    assert rows.codes.abs().amax(dim=1).eq(127).all()
    assert rows.scales.dtype == torch.float32
    assert ((rows.dequantize(torch.float64) - x.double()).abs() <= rows.scales[:, None].double() * 0.50001).all()


def test_rows_of_zeros_and_rows_too_small_for_a_scale_become_zeros() -> None:
    rows = quantize_rows(torch.tensor([[0.0, -0.0], [1e-37, -1e-38], [1e-30, 0.0]]))
    assert rows.scales.tolist()[:2] == [1.0, 1.0]
    assert rows.codes.tolist() == [[0, 0], [0, 0], [127, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_alone(value: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = value
    rows = quantize_rows(x)
    assert rows.dequantize()[1].isnan().all()
    assert rows.codes[1].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(rows.dequantize()[[0, 2]], torch.ones(2, 4))


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 3, dtype=torch.int8)], ids=["one axis", "integers"])
def test_what_are_no_float_rows_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"want floats \[R, D\]"):
        quantize_rows(bad)


def test_codes_and_scales_must_belong_together() -> None:
    codes, scales = torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)
    check_quantized(QuantizedRows(codes, scales), 8)
    for rows, message in (
        (QuantizedRows(codes.int(), scales), "codes are torch.int32"),
        (QuantizedRows(codes, scales), "want contiguous int8"),
        (QuantizedRows(torch.zeros(9, 3, dtype=torch.int8).T, scales), "want contiguous int8"),
        (QuantizedRows(codes, scales.double()), "scales are torch.float64"),
        (QuantizedRows(codes, torch.ones(4)), r"want contiguous float32\[3\]"),
        (QuantizedRows(codes, torch.ones(3, device="meta")), "on one device"),
    ):
        with pytest.raises(ValueError, match=message):
            check_quantized(rows, 9 if message == "want contiguous int8" else 8)
