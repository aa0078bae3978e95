"""Waiting times against published tables and a simulation of their own."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from app.cost.queueing import (
    BatchService,
    batch_service_latency,
    erlang_c,
    max_rate_within,
    mean_latency_s,
    p99_latency_s,
    servers_for_wait,
)

SERVICE = BatchService(0.1, 0.004, 10**9)


@pytest.mark.parametrize(("rho", "mean_s"), [(0.2, 0.192), (0.4, 0.256), (0.6, 0.384), (0.8, 0.767)])
def test_closed_form_simulation_and_table_agree(rho: float, mean_s: float) -> None:
    rate = rho / SERVICE.alpha_s
    assert mean_latency_s(SERVICE, rate) == pytest.approx(mean_s, rel=0.005)
    simulated = batch_service_latency(SERVICE, rate, num_requests=100_000)
    assert simulated.mean_s == pytest.approx(mean_s, rel=0.04)
    assert simulated.p99_s == pytest.approx(p99_latency_s(SERVICE, rate), rel=0.15)


@pytest.mark.parametrize(
    ("load", "cv2", "p99_s"), [(0.5, 1, 0.35), (0.8, 1, 0.55), (0.8, 4, 0.71), (0.9, 4, 0.96), (0.7, 16, 0.97)]
)
def test_a_cap_and_bursts_lengthen_the_tail_as_published(load: float, cv2: float, p99_s: float) -> None:
    capped = BatchService(0.1, 0.004, 64)
    assert batch_service_latency(capped, load * 180, cv2, 100_000).p99_s == pytest.approx(p99_s, rel=0.08)


def test_the_largest_rate_meets_the_slo_and_a_little_more_does_not() -> None:
    capped = BatchService(0.05, 0.01, 32)
    rate = max_rate_within(capped, 0.8, 4.0)
    assert 0 < rate < capped.max_rate_per_s
    assert batch_service_latency(capped, rate * 0.97, 4.0, 60_000, seed=1).p99_s <= 0.8 * 1.1
    assert batch_service_latency(capped, rate * 1.12, 4.0, 60_000, seed=1).p99_s > 0.8
    assert max_rate_within(capped, 0.055) == 0.0  # one sentence alone takes 60 ms


def test_overload_never_ends() -> None:
    capped = BatchService(0.1, 0.004, 64)
    assert math.isinf(batch_service_latency(capped, capped.max_rate_per_s).p99_s)
    assert math.isinf(mean_latency_s(capped, 251))
    assert batch_service_latency(capped, 0.0).mean_s == pytest.approx(0.104)


def simulated_wait_share(servers: int, load: float, wait: float) -> float:
    rng = np.random.default_rng(4)
    free = [0.0] * servers
    now, late, total = 0.0, 0, 300_000
    for gap, service in zip(rng.exponential(1 / load, total), rng.exponential(1, total), strict=True):
        now += gap
        start = max(now, heapq.heappop(free))
        late += start - now > wait
        heapq.heappush(free, start + service)
    return late / total


def test_erlang_c_is_what_a_simulation_shows() -> None:
    for servers, load, wait in ((3, 2.1, 0.5), (12, 9.0, 0.2)):
        expected = erlang_c(servers, load) * math.exp(-(servers - load) * wait)
        assert simulated_wait_share(servers, load, wait) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("servers", "wait", "load_per_server"), [(2, 5, 0.62), (8, 1, 0.64), (16, 0.5, 0.69), (64, 0.1, 0.78)]
)
def test_largest_utilisation_as_published(servers: int, wait: float, load_per_server: float) -> None:
    assert servers_for_wait(servers * (load_per_server - 0.006), wait, 0.01) <= servers
    assert servers_for_wait(servers * (load_per_server + 0.012), wait, 0.01) > servers


def test_bad_services_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha_s"):
        BatchService(0.1, 0.0, 8)
    with pytest.raises(ValueError, match="servers"):
        erlang_c(0, 1.0)
