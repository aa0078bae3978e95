from __future__ import annotations

import time

import pytest
import torch

from kernels.step_clock import stamp

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_spans_follow_each_other_and_measure_what_lies_between(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    spans = torch.zeros((8, 2), dtype=torch.int64, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    for _ in range(3):
        stamp(spans, count, is_end=False)
        if device == "cuda":
            torch.cuda._sleep(4_000_000)  # clock cycles: at least 2 ms on any GPU
        else:
            time.sleep(0.002)
        stamp(spans, count, is_end=True)
    assert int(count) == 3
    times = spans[:3].cpu().flatten()
    assert (times.diff() >= 0).all()
    assert ((spans[:3, 1] - spans[:3, 0]).cpu() >= 1_000_000).all()
    assert not spans[3:].any()


def test_only_the_last_spans_are_kept() -> None:
    spans, count = torch.zeros((2, 2), dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for _ in range(5):
        stamp(spans, count, is_end=False)
        stamp(spans, count, is_end=True)
    assert int(count) == 5
    assert spans[0, 0] > spans[1, 1]  # the fifth span lies where the third was


@pytest.mark.parametrize(
    ("spans", "count", "message"),
    [
        (torch.zeros((4, 2), dtype=torch.int32), torch.zeros(1, dtype=torch.int32), "spans"),
        (torch.zeros((4, 3), dtype=torch.int64), torch.zeros(1, dtype=torch.int32), "spans"),
        (torch.zeros((4, 2), dtype=torch.int64), torch.zeros(2, dtype=torch.int32), "count"),
    ],
)
def test_other_operands_are_refused(spans: torch.Tensor, count: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stamp(spans, count, is_end=True)
