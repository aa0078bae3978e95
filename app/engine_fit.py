"""Costs of the engine from timings of what it did, by least squares.

Steps and passes timed one by one (CPU) say most. Groups timed as one (GPU) say less: rows, cached tokens, passes and
sentences go together, and what one of them gets too much the others lack. So passes are on a curve like steps (one of few
tokens touches few experts; a line makes up for that with costs per row and per sentence), neither curve falls, small costs
that cannot be told from 0 are 0, and timings far off the others do not count (one stall of 0.3 s among 336 groups drove the
cost of rows to 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.cost.profile import Points, fit_costs
from app.cost.traces import Floats
from app.engine_timing import Timing

# Costs of the fit. Of the shared ones (never curves) the last three are what a pass and its sentences cost in
# decode steps, where those are timed on their own: the first step reads weights that the pass drove from the caches, and is
# fed the sentences' start tokens besides. They become parts of a0_s and host_s.
_SHARED = ("gamma_s", "a2_s", "host_s", "ending_s", "first_step_s", "start_s", "end_s")
_COSTS = ("tau0_s", "alpha_s", "beta_s", "a0_s", "a1_s", *_SHARED)
_STEP_RATIO, _PASS_RATIO = 2.0, 4.0  # between the knots of the curves
_TOLD_ERRORS = 3.0  # a cost of fewer standard errors is not told from 0
_MOST_TRIMS = 10
_FAR_SPREADS, _LEAST_FAR = 6.0, 0.1  # robust standard deviations off the others, but at least this share of the seconds


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs by name with standard errors, and seconds by size along the curves."""

    costs: dict[str, float]
    errors: dict[str, float]
    step_points: Points
    read_points: Points
    pass_points: Points

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> Fit:
        """Of steps and passes timed apart, or in groups. Raises ProfileError for too few timings."""
        parts = _Design.of(timings)
        if all(len(timing.rows) + len(timing.passes) <= 1 for timing in timings):
            return cls._of_single(parts)
        return cls._of_groups(parts)

    @classmethod
    def _of_single(cls, design: _Design) -> Fit:
        """With a curve of reading besides. Beside a curve the line is the best one without it."""
        step_knots, pass_knots = _knots(design.rows, _STEP_RATIO), _knots(design.tokens, _PASS_RATIO)
        read_knots = _quarters(design.cells)
        lines = [design.step_line, design.read_line, design.pass_line]
        straight, straight_errors = fit_costs(np.hstack([*lines, design.shared]), design.seconds)
        curves = [
            _curve(design.rows, step_knots),
            _curve(design.cells, read_knots)[:, 1:],
            _curve(design.tokens, pass_knots),
        ]
        found, errors = fit_costs(np.hstack([*curves, design.shared]), design.seconds)
        step_s, read_s, pass_s, shared = np.split(found, np.cumsum([each.shape[1] for each in curves]))
        count = len(_SHARED)
        return cls(
            costs=_named([*straight[:-count], *shared]),
            errors=_named([*straight_errors[:-count], *errors[-count:]]),
            step_points=_points(step_knots, step_s),
            read_points=_points(read_knots, np.concatenate([[0.0], read_s])),
            pass_points=_points(pass_knots, pass_s),
        )

    @classmethod
    def _of_groups(cls, design: _Design) -> Fit:
        """Reading stays a line. Beside a curve the line is the best one with the other curve."""
        step_knots, pass_knots = _knots(design.rows, _STEP_RATIO), _knots(design.tokens, _PASS_RATIO)
        steps, passes = _rising(_curve(design.rows, step_knots)), _rising(_curve(design.tokens, pass_knots))
        num_curved = steps.shape[1] + passes.shape[1] + 1
        optional = range(num_curved, num_curved + len(_SHARED))
        whole = np.hstack([steps, passes, design.read_line, design.shared])
        kept = np.ones(len(whole), bool)
        for _ in range(_MOST_TRIMS):
            found, errors, told = _fit_told(whole[kept], design.seconds[kept], optional)
            off = np.log(design.seconds / (whole @ found))
            off = np.abs(off - np.median(off[kept]))
            near = off <= max(_FAR_SPREADS * 1.4826 * float(np.median(off)), _LEAST_FAR)
            if (near == kept).all():
                break
            kept = near
        rest = np.hstack([design.read_line, design.shared * told[num_curved:]])
        step_line, step_errors = fit_costs(np.hstack([design.step_line, passes, rest])[kept], design.seconds[kept])
        pass_line, pass_errors = fit_costs(np.hstack([design.pass_line, steps, rest])[kept], design.seconds[kept])
        beta, shared = found[num_curved - 1], found[num_curved:]
        step_s, pass_s = np.split(found[: num_curved - 1], [len(step_knots)])
        return cls(
            costs=_named([*step_line[:2], beta, *pass_line[:2], *shared]),
            errors=_named([*step_errors[:2], errors[num_curved - 1], *pass_errors[:2], *errors[num_curved:]]),
            step_points=_points(step_knots, step_s.cumsum()),
            read_points=(),
            pass_points=_points(pass_knots, pass_s.cumsum()),
        )


@dataclass(frozen=True, slots=True)
class _Design:
    """N timings: seconds float64[N]; sizes of what each did, as many as it did; counts float64[N, K] that lines multiply."""

    seconds: Floats
    rows: list[Floats]
    cells: list[Floats]
    tokens: list[Floats]
    step_line: Floats
    read_line: Floats
    pass_line: Floats
    shared: Floats

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> _Design:
        rows = [np.array(timing.rows, np.float64) for timing in timings]
        cells = [np.array(timing.target_cells, np.float64) for timing in timings]
        tokens = [np.array([sum(lengths) for lengths in timing.passes], np.float64) for timing in timings]
        return cls(
            seconds=np.array([timing.seconds for timing in timings]),
            rows=rows,
            cells=cells,
            tokens=tokens,
            step_line=np.array([[len(each), each.sum()] for each in rows]),
            read_line=np.array([[each.sum()] for each in cells]),
            pass_line=np.array([[len(each), each.sum()] for each in tokens]),
            shared=_shared_design(timings),
        )


def _fit_told(design: Floats, seconds: Floats, optional: Sequence[int]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """fit_costs without those of the `optional` columns that cannot be told from 0, the worst left out first: 0, with the
    error as long as they were in. Also which columns were left in, bool[K].
    """
    told, errors_out = np.ones(design.shape[1], bool), np.zeros(design.shape[1])
    while True:
        found, errors = fit_costs(design * told, seconds)
        sure = np.divide(found, errors, out=np.zeros_like(found), where=errors > 0)
        left = [column for column in optional if told[column]]
        worst = min(left, key=lambda column: float(sure[column]), default=None)
        if worst is None or sure[worst] >= _TOLD_ERRORS:
            return found, np.where(told, errors, errors_out), told
        told[worst], errors_out[worst] = False, errors[worst]


def _named(costs: Sequence[float]) -> dict[str, float]:
    return dict(zip(_COSTS, map(float, costs), strict=True))


def _points(sizes: Floats, seconds: Floats) -> Points:
    return tuple(zip(sizes.tolist(), seconds.tolist(), strict=True))


def _rising(curve: Floats) -> Floats:
    """The points of a curve as what each has more than the one before: with none below 0 it never falls."""
    return curve[:, ::-1].cumsum(1)[:, ::-1]


def _shared_design(timings: Sequence[Timing]) -> Floats:
    """How often each of _SHARED occurs in each timing, float64[N, K]."""
    design = []
    for timing in timings:
        squares = sum(length * length for lengths in timing.passes for length in lengths)
        started, ended = timing.num_started, timing.num_ended
        counts = [timing.source_cells, squares, sum(map(len, timing.passes)), ended > 0, started > 0, started, ended]
        design.append(counts)
    return np.array(design, np.float64)


def _knots(sizes: Sequence[Floats], ratio: float) -> Floats:
    """Sizes between which seconds are straight: the smallest and the largest seen, and those of its multiples by powers of
    `ratio` between them that some size is near.
    """
    seen = np.unique(np.concatenate(sizes))
    least, most = float(seen.min()), float(seen.max())
    multiples = least * ratio ** np.arange(int(np.log(most / least) / np.log(ratio)) + 1)
    near = np.abs(np.log2(seen / multiples[:, None])).min(1) < 0.5
    return np.unique([*multiples[near & (multiples < 0.75 * most)], most])


def _quarters(sizes: Sequence[Floats]) -> Floats:
    """0, the largest size seen, and its half, quarter and eighth."""
    return np.array([0.0, 0.125, 0.25, 0.5, 1.0]) * float(np.concatenate(sizes).max())


def _curve(sizes: Sequence[Floats], knots: Floats) -> Floats:
    """float64[N, K]: the sizes of each timing as shares of the knots beside them, added up."""
    shares = [np.stack([np.interp(each, knots, one) for one in np.eye(len(knots))], 1) for each in sizes]
    return np.array([each.sum(0) for each in shares])
