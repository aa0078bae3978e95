"""Traces: published shapes, arrivals with the right moments, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.cost.traces import Trace, TraceError, nyc_taxi, read_csv, servegen_m_large, servegen_m_large_clients


def test_m_large_has_its_published_shape() -> None:
    trace = servegen_m_large()
    rate = trace.rate_per_s
    assert len(rate) == 2016
    assert trace.mean_rate_per_s == pytest.approx(196, abs=1)
    assert rate.max() / rate.mean() == pytest.approx(2.98, abs=0.02)
    assert np.corrcoef(rate[1:], rate[:-1])[0, 1] == pytest.approx(0.88, abs=0.01)
    clients = servegen_m_large_clients()
    assert len(clients) == 162
    assert sum(client.mean_rate_per_s for client in clients) == pytest.approx(trace.mean_rate_per_s)
    assert clients[0].mean_rate_per_s / trace.mean_rate_per_s == pytest.approx(0.16, abs=0.01)


def test_the_taxi_shape() -> None:
    trace = nyc_taxi()
    assert trace.duration_s == 8 * 7 * 86_400
    assert trace.mean_rate_per_s == pytest.approx(196)
    assert np.corrcoef(trace.rate_per_s[336:], trace.rate_per_s[:-336])[0, 1] > 0.85
    with pytest.raises(TraceError, match="whole weeks"):
        nyc_taxi(40)


def test_arrivals_have_the_windows_mean_and_dispersion_and_shifted_edges() -> None:
    trace = Trace("two", 3000, np.array([20.0, 80.0, 20.0, 80.0]), np.array([1.0, 3.0, 1.0, 3.0]))
    edges = set()
    for seed in range(4):
        counts = trace.arrivals(seed)
        assert len(counts) == trace.duration_s
        shift = int(np.random.default_rng(seed).integers(3000))
        edges.add(shift)
        quiet, busy = counts[: 3000 - shift], counts[3000 - shift : 6000 - shift]
        assert busy.mean() == pytest.approx(80, rel=0.03)
        assert busy.var() / busy.mean() == pytest.approx(3, rel=0.15)
        if len(quiet) > 500:
            assert quiet.var() / quiet.mean() == pytest.approx(1, rel=0.2)
        np.testing.assert_array_equal(trace.arrivals(seed, 100, 900), counts[100:900])
    assert len(edges) == 4


def test_a_trace_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("time,requests\n2026-11-24T00:00:00,600\n2026-11-24T00:05:00,1200\n2026-11-24T00:10:00,0\n")
    trace = read_csv(path)
    assert (trace.window_s, trace.rate_per_s.tolist()) == (300, [2.0, 4.0, 0.0])
    for text, message in (
        ("time,requests\n0,1\n", "two lines"),
        ("time,requests\n0,1\n60,x\n", "time,requests"),
        ("time,requests\n0,1\n60,2\n240,3\n", "mine.csv:4"),
        ("time,requests\n0,1\n60,-2\n", "negative"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=message):
            read_csv(path)
