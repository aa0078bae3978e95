from __future__ import annotations

import pytest
import torch

from engine.bench.measure import MemoryMeter, StepProfile, read_bandwidth


def test_gaps_are_found_between_the_kernels_of_two_streams() -> None:
    """Out of order, overlapping, one kernel inside another; gaps of 5 and 60 us."""
    work = [
        ("gemm", 100.0, 110.0),
        ("gemm", 95.0, 120.0),
        ("Memcpy DtoH (Device -> Pinned)", 125.0, 130.0),
        ("route", 190.0, 200.0),
        ("Memset (Device)", 130.0, 130.0),
        ("attention", 196.0, 205.0),
    ]
    profile = StepProfile.from_work(work, num_steps=2)
    assert profile.kernels == 2.0
    assert profile.copies == 1.0
    assert profile.idle_us == pytest.approx(32.5)
    assert profile.longest_gap_us == pytest.approx(60.0)
    assert profile.gapless_share == 0.5
    assert profile.busy_share == pytest.approx(1 - 65 / 110)


def test_one_kernel_leaves_no_gap() -> None:
    profile = StepProfile.from_work([("gemm", 1.0, 2.0)], num_steps=1)
    assert (profile.idle_us, profile.gapless_share, profile.busy_share) == (0.0, 1.0, 1.0)


def test_a_cpu_has_a_bandwidth_and_no_device_memory() -> None:
    assert 1e8 < read_bandwidth(torch.device("cpu")) < 1e13
    meter = MemoryMeter(torch.device("cpu"))
    meter.start()
    assert meter.peak_bytes() is None
