"""Histograms against sorted samples."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.latency import CURVE_PERCENTILES, merge, summarise


def test_percentiles_agree_with_sorting():
    samples = np.random.default_rng(1).lognormal(-3, 1.2, size=20_001)
    summary = summarise(samples)
    assert summary.count == 20_001
    assert summary.mean_s == pytest.approx(samples.mean(), rel=2e-3)
    assert summary.max_s == pytest.approx(samples.max(), rel=2e-3)
    for percentile, value in zip(CURVE_PERCENTILES, summary.curve_s, strict=True):
        assert value == pytest.approx(np.percentile(samples, percentile, method="inverted_cdf"), rel=2e-3, abs=2e-6)
    assert summary.curve_s == sorted(summary.curve_s)


def test_merging_is_the_same_as_measuring_together():
    rng = np.random.default_rng(2)
    parts = [rng.exponential(scale, size=500) for scale in (0.01, 0.5, 3)]
    together = summarise(np.concatenate(parts))
    merged = merge([summarise(part) for part in parts])
    assert merged.mean_s == pytest.approx(together.mean_s)
    assert merged.model_dump(exclude={"hdr", "mean_s"}) == together.model_dump(exclude={"hdr", "mean_s"})


def test_nothing_and_extremes():
    assert summarise([]) is None
    assert merge([]) is None
    extreme = summarise([-1e-9, 1e9])
    assert extreme.p50_s == 0
    assert extreme.max_s == pytest.approx(3600, rel=1e-3)
