"""Gradient-boosted quantile regression with oblivious trees, in numpy: small, deterministic, fast to evaluate one row at
a time.

Every level of a tree asks one question of all rows, so a tree of depth d is d (feature, threshold) pairs and 2^d leaf
values. Trees are grown on the pinball loss's gradient; a leaf then moves by the quantile of its rows' residuals (Friedman
2001, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from app.cost.traces import Floats, Ints

_NUM_BINS = 32


@dataclass(frozen=True, slots=True)
class BoostingOptions:
    """quantile in (0, 1); min_leaf rows below which a leaf does not move; row_share of rows drawn for each tree."""

    quantile: float
    num_trees: int = 120
    depth: int = 4
    learning_rate: float = 0.08
    min_leaf: int = 80
    row_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is {self.quantile}; it must lie between 0 and 1")
        if self.num_trees < 1 or not 1 <= self.depth <= 8:
            raise ValueError("num_trees must be at least 1 and depth between 1 and 8")


@dataclass(frozen=True, slots=True)
class QuantileForest:
    """A fitted model. feature int64[N, d], threshold float64[N, d], leaf float64[N, 2^d] for N trees of depth d."""

    start: float
    feature: Ints
    threshold: Floats
    leaf: Floats

    def predict(self, rows: Floats) -> Floats:
        """float64[R] from rows float64[R, F]; one row gives exactly what it gives among others."""
        weights = 1 << np.arange(self.feature.shape[1])
        index = (rows[:, self.feature] > self.threshold) @ weights
        return np.asarray(self.start + self.leaf[np.arange(len(self.leaf)), index].sum(1))


def fit_quantile_forest(rows: Floats, target: Floats, options: BoostingOptions) -> QuantileForest:
    """Fit rows float64[R, F] to target float64[R]; needs at least 2 * min_leaf rows."""
    if len(rows) < 2 * options.min_leaf or len(rows) != len(target):
        raise ValueError(f"{len(rows)} rows and {len(target)} targets; at least {2 * options.min_leaf} of both are needed")
    rng = np.random.default_rng(options.seed)
    edges = np.quantile(rows, np.linspace(0, 1, _NUM_BINS + 1)[1:-1], axis=0)  # [bins - 1, F]
    bins = np.stack([np.searchsorted(edges[:, f], rows[:, f]) for f in range(rows.shape[1])], 1)
    start = float(np.quantile(target, options.quantile))
    predicted = np.full(len(target), start)
    trees = []
    for _ in range(options.num_trees):
        drawn = np.flatnonzero(rng.random(len(target)) < options.row_share)
        residual = target - predicted
        gradient = np.where(residual > 0, options.quantile, options.quantile - 1.0)
        feature, cut = _grow(bins[drawn], gradient[drawn], options)
        index = (bins[:, feature] > cut) @ (1 << np.arange(options.depth))
        leaf = options.learning_rate * _leaf_quantiles(index, residual, options)
        predicted += leaf[index]
        trees.append((feature, edges[cut, feature], leaf))
    features, thresholds, leaves = zip(*trees, strict=True)
    return QuantileForest(start, np.array(features), np.array(thresholds), np.array(leaves))


def _grow(bins: Ints, gradient: Floats, options: BoostingOptions) -> tuple[Ints, Ints]:
    """Feature int64[d] and bin int64[d] per level; a row goes right when its bin is greater."""
    num_features = bins.shape[1]
    flat = bins + np.arange(num_features) * _NUM_BINS
    weight = np.repeat(gradient, num_features)
    leaf = np.zeros(len(bins), np.int64)
    chosen = []
    for level in range(options.depth):
        size = (1 << level) * num_features * _NUM_BINS
        where = (flat + (leaf * num_features * _NUM_BINS)[:, None]).ravel()
        shape = (1 << level, num_features, _NUM_BINS)
        count = np.bincount(where, minlength=size).reshape(shape).cumsum(2).astype(np.float64)
        total = np.bincount(where, weight, size).reshape(shape).cumsum(2)
        best = int(np.argmax(_split_gain(count, total)))
        feature, cut = divmod(best, _NUM_BINS - 1)
        chosen.append((feature, cut))
        leaf += (bins[:, feature] > cut).astype(np.int64) << level
    features, cuts = zip(*chosen, strict=True)
    return np.array(features), np.array(cuts)


def _split_gain(count: Floats, total: Floats) -> Floats:
    """float64[F, bins - 1]: variance of the gradient explained by each question, over all leaves."""
    left_n, left = count[..., :-1], total[..., :-1]
    right_n, right = count[..., -1:] - left_n, total[..., -1:] - left
    gain: npt.NDArray[np.float64] = (left**2 / np.maximum(left_n, 1) + right**2 / np.maximum(right_n, 1)).sum(0)
    return gain


def _leaf_quantiles(index: Ints, residual: Floats, options: BoostingOptions) -> Floats:
    values = np.zeros(1 << options.depth)
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(len(values) + 1))
    for leaf, (begin, end) in enumerate(pairwise(bounds.tolist())):
        if end - begin >= options.min_leaf:
            values[leaf] = np.quantile(residual[order[begin:end]], options.quantile)
    return values
