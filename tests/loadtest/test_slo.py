"""The verdict against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.slo import ServiceLevel, binomial_cdf


def exact_cdf(successes: int, trials: int, probability: Fraction) -> Fraction:
    terms = (math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(successes + 1))
    return sum(terms, Fraction(0))


@given(trials=st.integers(1, 60), data=st.data(), probability=st.fractions("1/1000", "999/1000"))
def test_binomial_cdf_is_exact(trials, data, probability):
    successes = data.draw(st.integers(0, trials))
    assert binomial_cdf(successes, trials, float(probability)) == pytest.approx(
        float(exact_cdf(successes, trials, probability)), rel=1e-9, abs=1e-12
    )


def test_binomial_cdf_survives_sizes_where_single_terms_underflow():
    total, share = 270_336, 0.01  # MLPerf Server's sample size
    drawn = np.random.default_rng(1).binomial(total, share, size=200_000)
    for bad in (2570, 2650, 2703, 2800):
        assert binomial_cdf(bad, total, share) == pytest.approx(np.mean(drawn <= bad), abs=0.005)


@pytest.mark.parametrize(
    ("percentile", "confidence", "expected"),
    [(99, 0.99, 459), (99, 0.95, 299), (90, 0.99, 44), (97, 0.95, 99), (50, 0.95, 5)],
)
def test_without_violations_the_least_number_is_log_alpha_over_log_p(percentile, confidence, expected):
    slo = ServiceLevel(latency_s=1, percentile=percentile)
    assert expected == math.ceil(math.log(1 - confidence) / math.log(percentile / 100))
    assert slo.min_requests(confidence) == expected
    assert slo.verdict(expected, 0, confidence) == "met"
    assert slo.verdict(expected - 1, 0, confidence) == "undecided"


@pytest.mark.parametrize("num_bad", [1, 7])
def test_more_violations_need_more_requests(num_bad):
    slo = ServiceLevel(latency_s=1, percentile=99)
    needed = slo.min_requests(0.95, num_bad)
    assert needed > slo.min_requests(0.95, num_bad - 1)
    assert float(exact_cdf(num_bad, needed, Fraction(1, 100))) <= 0.05
    assert float(exact_cdf(num_bad, needed - 1, Fraction(1, 100))) > 0.05


def test_a_service_just_below_the_promise_is_rarely_called_good():
    """All outcomes of 600 requests enumerated: the probability of a wrong `met` is at most 1 - confidence."""
    slo, total, bad_share = ServiceLevel(latency_s=1, percentile=95), 600, Fraction(5, 100)
    passing = [bad for bad in range(total + 1) if slo.verdict(total - bad, bad, 0.95) == "met"]
    assert passing == list(range(len(passing)))
    assert 0.02 < float(exact_cdf(len(passing) - 1, total, bad_share)) <= 0.05


def test_a_hopeless_run_is_known_early():
    slo = ServiceLevel(latency_s=1, percentile=99)
    assert slo.verdict(0, 2, 0.95) == "missed"
    assert slo.verdict(0, 1, 0.95) == "missed"  # 1 of 1 bad has probability 1 %
    assert slo.verdict(50, 1, 0.95) == "undecided"
    assert slo.verdict(0, 0, 0.95) == "undecided"
