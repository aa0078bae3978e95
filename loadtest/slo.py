"""The promise (a share of requests answered well within a time) and the statistics that decide whether a run shows it.

Early stopping as in the MLPerf Inference Server scenario: a run of n requests with t bad ones shows the promise (share p)
when a service whose true share of good requests were just p would do so well only with probability 1 - confidence:
P(Binomial(n, 1 - p) <= t) <= 1 - confidence. The mirrored test, P(Binomial(n, 1 - p) >= t) <= 1 - confidence, ends a
hopeless run; looking several times makes that error somewhat likelier, which can only lower the result.

Like MLPerf's, the test takes requests as independent. Violations of a queue come in clusters, so the true confidence is
lower than the stated one: near the knee, trust long trials and repetitions more than a single short one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["met", "missed", "undecided"]


class ServiceLevel(BaseModel):
    """`percentile` % of all requests are answered correctly within latency_s seconds of their intended send time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency_s: Annotated[float, Field(gt=0)]
    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0

    def verdict(self, num_good: int, num_bad: int, confidence: float) -> Verdict:
        """What the counts show at this confidence."""
        total, bad_share = num_good + num_bad, 1 - self.percentile / 100
        if binomial_cdf(num_bad, total, bad_share) <= 1 - confidence:
            return "met"
        if 1 - binomial_cdf(num_bad - 1, total, bad_share) <= 1 - confidence:
            return "missed"
        return "undecided"

    def min_requests(self, confidence: float, num_bad: int = 0) -> int:
        """Fewest requests, `num_bad` of them bad, that can show the promise."""
        low, high = num_bad, 2 * num_bad + 1
        while self.verdict(high - num_bad, num_bad, confidence) != "met":
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.verdict(middle - num_bad, num_bad, confidence) == "met":
                high = middle
            else:
                low = middle
        return high

    def __str__(self) -> str:
        """`99 % within 0.5 s`."""
        return f"{self.percentile:g} % within {self.latency_s:g} s"


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(Binomial(trials, probability) <= successes), summed in log space; 0 < probability < 1."""
    if successes < 0:
        return 0.0
    if successes >= trials:
        return 1.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    log_ratio, log_term = log_p - log_q, trials * log_q
    logs = [log_term]
    for count in range(1, successes + 1):
        log_term += math.log((trials - count + 1) / count) + log_ratio
        logs.append(log_term)
    highest = max(logs)
    return min(1.0, math.exp(highest) * math.fsum(math.exp(value - highest) for value in logs))
