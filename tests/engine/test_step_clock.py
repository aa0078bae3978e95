from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.step_clock import GapReport, StepClock


def test_gaps_are_what_lies_between_the_spans() -> None:
    """Four passes of 1 ms; gaps of 10, 50 and 250 us: one of three is long."""
    us = np.array([[0, 1000], [1010, 2010], [2060, 3060], [3310, 4310]])
    report = GapReport.from_spans(us * 1000 + 10**15)
    assert report.num_passes == 4
    assert report.gapless_share == pytest.approx(2 / 3)
    assert report.median_us == pytest.approx(50)
    assert report.longest_us == pytest.approx(250)
    assert report.busy_share == pytest.approx(4000 / 4310)


def test_the_clock_keeps_the_last_spans_in_order() -> None:
    clock = StepClock(torch.device("cpu"), capacity=4)
    assert clock.gaps() is None
    for _ in range(7):
        clock.start()
        clock.end()
    spans = clock.spans()
    assert spans.shape == (4, 2)
    assert (np.diff(spans.flatten()) >= 0).all()
    report = clock.gaps()
    assert report is not None
    assert report.num_passes == 4
    clock.reset()
    assert clock.spans().shape == (0, 2)
