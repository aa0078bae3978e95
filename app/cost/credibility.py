"""Means of many small samples, each drawn towards those of its kin: what a pair seen three times may say.

Ratios x of pairs i in languages g, from batches j of volume w (characters, tokens):

    x_gij = mu + language_g + pair_gi + noise_gij,    Var(noise) = s2 / w,  Var(pair) = t2,  Var(language) = l2

The estimate of a pair is Z x_gi + (1 - Z) m_g with Z = w / (w + s2 / t2) and m_g the language's mean, itself drawn towards
mu in the same way: the credibility premium of Bühlmann and Straub (1970), nested as in Jewell (1975); both in Bühlmann and
Gisler, A Course in Credibility Theory (2005), chapters 4 and 6. It is the posterior mean when all parts are normal. s2 is
the pooled variance within pairs. t2 and l2 are Bühlmann and Straub's unbiased estimates: with weights u = 1 / noise,

    t2 = (sum u (x - mean)^2 - degrees of freedom) / (sum u - sum u^2 / sum u),   not below 0,

sums within and over languages. Where pairs differ no more than noise explains, t2 is 0 and all share one mean. Volume
weighs here, so a few odd texts of a rare pair do not make all pairs look different, as they do in Paule and Mandel's or a
maximum likelihood estimate.

Legend: I pairs, G languages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.cost.traces import Floats, Ints


@dataclass(frozen=True, slots=True)
class Credibility:
    """Estimates: pair float64[I], language float64[G], overall. weight float64[I]: Z, the trust in a pair's own mean.

    pair_variance and language_variance are t2 and l2 of the module docstring.
    """

    pair: Floats
    language: Floats
    overall: float
    weight: Floats
    pair_variance: float
    language_variance: float


def shrink(mean: Floats, noise: Floats, language: Ints) -> Credibility:
    """From each pair's own mean float64[I], its variance by noise alone (s2 / w, positive) and its language int64[I], which
    counts from 0 to G - 1 without gaps.
    """
    pair_variance = _between(mean, noise, language)
    groups, group_noise = _weighted_means(mean, noise + pair_variance, language)
    all_alike = np.zeros(len(groups), np.int64)
    language_variance = _between(groups, group_noise, all_alike)
    overall, _ = _weighted_means(groups, group_noise + language_variance, all_alike)
    trust = language_variance / (language_variance + group_noise)
    languages = trust * groups + (1 - trust) * overall[0]
    weight = pair_variance / (pair_variance + noise)
    pairs = weight * mean + (1 - weight) * languages[language]
    return Credibility(pairs, languages, float(overall[0]), weight, pair_variance, language_variance)


def _weighted_means(mean: Floats, variance: Floats, group: Ints) -> tuple[Floats, Floats]:
    """Precision-weighted mean of each group and its variance, float64[G] each."""
    precision = np.bincount(group, 1 / variance)
    return np.bincount(group, mean / variance) / precision, 1 / precision


def _between(mean: Floats, noise: Floats, group: Ints) -> float:
    """Variance between members of a group beyond noise, at least 0; 0 too when no group has two members."""
    weight, groups = 1 / noise, _weighted_means(mean, noise, group)[0]
    freedom = len(mean) - len(groups)
    if freedom == 0:
        return 0.0
    scale = weight.sum() - (np.bincount(group, weight**2) / np.bincount(group, weight)).sum()
    return max(0.0, float(((weight * (mean - groups[group]) ** 2).sum() - freedom) / scale))
