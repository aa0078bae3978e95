"""Shrinkage against the conditional mean of the joint normal, written out as one matrix, and the textbook's variance."""

from __future__ import annotations

import numpy as np
import pytest

from app.cost.credibility import shrink
from app.cost.traces import Floats, Ints


def conditional_means(mean: Floats, noise: Floats, language: Ints, pair_variance: float, language_variance: float) -> Floats:
    """E[mu + language + pair | all means], mu by generalised least squares: no precision weights, no nesting."""
    same = language[:, None] == language[None, :]
    truth = language_variance * same + pair_variance * np.eye(len(mean))
    seen = np.linalg.inv(truth + np.diag(noise))
    ones = np.ones(len(mean))
    overall = ones @ seen @ mean / (ones @ seen @ ones)
    return np.asarray(overall + truth @ seen @ (mean - overall))


@pytest.mark.parametrize("seed", range(8))
def test_estimates_are_the_conditional_means_of_the_joint_normal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    language = np.concatenate([np.arange(5), rng.integers(0, 5, 18), [5]])  # the last language has one pair
    noise = rng.lognormal(-4, 2, len(language))
    mean = 1 + rng.normal(0, 0.3, 6)[language] + rng.normal(0, 0.2, len(language)) + rng.normal(0, np.sqrt(noise))
    found = shrink(mean, noise, language)
    assert found.pair_variance > 0
    expected = conditional_means(mean, noise, language, found.pair_variance, found.language_variance)
    np.testing.assert_allclose(found.pair, expected, rtol=1e-9)


def test_the_variance_is_the_textbooks_and_right_on_average() -> None:
    """Bühlmann and Gisler (2005), formula 4.27: c (I / (I - 1) sum w/W (x - mean)^2 - I s2 / W)."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(300):
        volume = rng.lognormal(2, 1, 40)
        noise = 1.7 / volume
        mean = rng.normal(2.0, np.sqrt(noise + 0.3))
        share, count = volume / volume.sum(), len(volume)
        c = (count - 1) / count / (share * (1 - share)).sum()
        spread = (share * (mean - share @ mean) ** 2).sum()
        textbook = c * (count / (count - 1) * spread - count * 1.7 / volume.sum())
        found.append(shrink(mean, noise, np.zeros(count, np.int64)).pair_variance)
        assert found[-1] == pytest.approx(max(textbook, 0.0), rel=1e-9)
    assert np.mean(found) == pytest.approx(0.3, rel=0.05)


def test_both_variances_are_right_on_average() -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(400):
        language = np.repeat(np.arange(12), rng.integers(1, 9, 12))
        noise = rng.lognormal(-2, 1, len(language))
        mean = 1 + rng.normal(0, 0.5, 12)[language] + rng.normal(0, 0.4, len(language)) + rng.normal(0, np.sqrt(noise))
        each = shrink(mean, noise, language)
        found.append((each.pair_variance, each.language_variance))
    np.testing.assert_allclose(np.mean(found, axis=0), [0.16, 0.25], rtol=0.1)


def test_where_noise_explains_all_there_is_one_mean() -> None:
    rng = np.random.default_rng(5)
    noise = rng.uniform(0.01, 0.5, 400)
    alike = shrink(rng.normal(2.0, 0.9 * np.sqrt(noise)), noise, np.zeros(400, np.int64))
    assert alike.pair_variance == 0.0
    np.testing.assert_allclose(alike.pair, alike.overall)


def test_one_pair_is_itself_and_pairs_of_their_own_languages_borrow_from_all() -> None:
    alone = shrink(np.array([0.4]), np.array([0.1]), np.array([0]))
    assert (alone.pair[0], alone.overall) == (pytest.approx(0.4), pytest.approx(0.4))
    apart = shrink(np.array([0.1, 0.5, 0.9]), np.full(3, 0.05), np.arange(3))
    assert apart.pair_variance == 0.0
    assert 0.1 < apart.pair[0] < 0.5 < apart.pair[2] < 0.9
