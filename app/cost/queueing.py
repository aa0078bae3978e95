"""Waiting times: of a replica that batches (the one to plan with), and of classic multi-server queues.

A batch of b sentences takes tau0_s + alpha_s * b; all that waits is taken at once. With Poisson arrivals at rate lambda and
rho = lambda * alpha < 1 the mean time in system is close to (Inoue 2021, arXiv 1912.06322; checked here by simulation, 1
% under at rho 0.92)

    (3/2) tau0 / (1 - rho) + (alpha / 2) (rho + 2) / (1 - rho^2)

and its p99 about 1.6 times that. Bursts and a cap on the batch make both longer; `batch_service_latency` simulates those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_P99_OVER_MEAN = 1.6


@dataclass(frozen=True, slots=True)
class BatchService:
    """Service of one replica: tau0_s seconds per batch, alpha_s per sentence in it, at most max_batch sentences."""

    tau0_s: float
    alpha_s: float
    max_batch: int

    def __post_init__(self) -> None:
        if not (self.tau0_s >= 0 and self.alpha_s > 0 and self.max_batch >= 1):
            raise ValueError("tau0_s must be at least 0, alpha_s positive and max_batch at least 1")

    @property
    def max_rate_per_s(self) -> float:
        """Sentences per second with every batch full; no queue is stable at or above it."""
        return self.max_batch / (self.tau0_s + self.alpha_s * self.max_batch)


@dataclass(frozen=True, slots=True)
class Latency:
    """Time in system in seconds."""

    mean_s: float
    p99_s: float
    mean_batch: float


def mean_latency_s(service: BatchService, rate_per_s: float) -> float:
    """The closed form: Poisson arrivals, no cap on the batch. Infinite at rho >= 1."""
    rho = rate_per_s * service.alpha_s
    if rho >= 1:
        return math.inf
    return 1.5 * service.tau0_s / (1 - rho) + 0.5 * service.alpha_s * (rho + 2) / (1 - rho * rho)


def p99_latency_s(service: BatchService, rate_per_s: float) -> float:
    """1.6 times the closed form's mean: Poisson arrivals, no cap on the batch."""
    return _P99_OVER_MEAN * mean_latency_s(service, rate_per_s)


def batch_service_latency(
    service: BatchService, rate_per_s: float, arrival_cv2: float = 1.0, num_requests: int = 50_000, seed: int = 0
) -> Latency:
    """Simulated latency with the batch cap and gamma-distributed gaps of squared coefficient of variation `arrival_cv2`.

    The first tenth is left out. Above the maximum rate the queue grows without end: infinite.
    """
    if rate_per_s >= service.max_rate_per_s:
        return Latency(math.inf, math.inf, service.max_batch)
    if rate_per_s <= 0:
        one = service.tau0_s + service.alpha_s
        return Latency(one, one, 1.0)
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(1 / arrival_cv2, arrival_cv2 / rate_per_s, num_requests)
    arrived = np.cumsum(gaps)
    finished = np.empty(num_requests)
    now, first, num_batches = 0.0, 0, 0
    while first < num_requests:
        now = max(now, float(arrived[first]))
        end = min(int(np.searchsorted(arrived, now, side="right")), first + service.max_batch)
        now += service.tau0_s + service.alpha_s * (end - first)
        finished[first:end] = now
        first, num_batches = end, num_batches + 1
    times = (finished - arrived)[num_requests // 10 :]
    return Latency(float(times.mean()), float(np.quantile(times, 0.99)), num_requests / num_batches)


def max_rate_within(service: BatchService, slo_s: float, arrival_cv2: float = 1.0, tolerance: float = 0.005) -> float:
    """Largest rate per second whose simulated p99 is within slo_s; 0 when not even one sentence alone is.

    This replaces a flat utilisation target: the allowed load follows from the service, the cap, the SLO and the bursts.
    """
    if service.tau0_s + service.alpha_s > slo_s:
        return 0.0
    low, high = 0.0, service.max_rate_per_s
    while high - low > tolerance * service.max_rate_per_s:
        rate = 0.5 * (low + high)
        if batch_service_latency(service, rate, arrival_cv2, num_requests=20_000).p99_s <= slo_s:
            low = rate
        else:
            high = rate
    return low


def erlang_c(servers: int, load: float) -> float:
    """Probability to wait in M/M/c at offered load (rate * mean service time), by Erlang B's recursion; 1 at load >=
    servers.
    """
    if servers < 1 or load < 0:
        raise ValueError("servers must be at least 1 and load at least 0")
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


def servers_for_wait(load: float, wait: float, share: float) -> int:
    """Fewest M/M/c servers so that at most `share` wait longer than `wait` mean service times."""
    servers = max(1, math.floor(load) + 1)
    while erlang_c(servers, load) * math.exp(-(servers - load) * wait) > share:
        servers += 1
    return servers
