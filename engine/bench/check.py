"""Is an engine right? Its tokens beside transformers', and its hypotheses judged by transformers.

Free-running tokens of two right bf16 implementations differ sooner or later, since a near tie may fall either way and the
rest of a sentence follows. So the gate in half precision reads the engine's own hypotheses with transformers in fp32 (all
positions at once, no cache): the scores must agree, and greedy tokens must be its best ones. Two ways to pass: absolute
limits, or being no further from fp32 than transformers itself is in the engine's precision (rounding flips the choice of
experts now and then, and how much that moves a score depends on the model). Measured on a random model of D 256, 24 + 12
layers, mean score error and share of best tokens: 0.010 and 0.95 for a right engine, 0.17 and 0.90 without the factor 0.8 on
expert outputs, 0.08 and 0.86 with the experts of one layer left out; with one expert a token 0.006 and 0.97, 0.09 and 0.91,
0.05 and 0.91. In fp32 every token must be equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.engine_run import EngineRun
from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine
from engine.bench.peers import Peer
from engine.bench.shapes import Cell
from engine.types import Int32Array

CHECK_CELLS = (Cell(64, 1), Cell(32, 4))
MAX_SCORE_ERROR = 0.025
MIN_BEST_SHARE = 0.9
PEER_FACTOR = 1.5  # of transformers' own error in half precision: a few flipped experts make most of either mean
PEER_MARGIN = 0.02  # of transformers' own share of best tokens


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check batch. token_agreement: share of equal tokens, free-running; score_error: mean absolute difference to the
    judge; peer_score_error, peer_best_share: the same of transformers in the engine's precision.
    """

    cell: str
    exact_wanted: bool
    token_agreement: float
    score_error: float
    best_share: float | None
    peer_score_error: float = 0.0
    peer_best_share: float = 1.0

    @property
    def failure(self) -> str | None:
        """What is wrong, or None."""
        if self.exact_wanted:
            if self.token_agreement < 1.0:
                return f"{self.cell}: only {self.token_agreement:.1%} of the tokens equal transformers' in fp32"
            return None
        limit = max(MAX_SCORE_ERROR, PEER_FACTOR * self.peer_score_error)
        if not self.score_error <= limit:
            return f"{self.cell}: scores are off by {self.score_error:.4f} (limit {limit:.4f})"
        least = min(MIN_BEST_SHARE, self.peer_best_share - PEER_MARGIN)
        if self.best_share is not None and not self.best_share >= least:
            return f"{self.cell}: {self.best_share:.1%} of the tokens are the judge's best (limit {least:.1%})"
        return None


def token_agreement(ours: Int32Array, theirs: Int32Array) -> float:
    """Share of equal tokens at equal places, int32[B, T] both."""
    return float((ours == theirs).mean())


def check_engine(
    engine: OurEngine,
    oracle: Peer,
    batches: list[tuple[CellInputs, EngineRun]],
    *,
    exact: bool,
    judge: Peer | None = None,
) -> list[CheckResult]:
    """Run the check batches (inputs and transformers' own output) through our engine. judge: transformers in fp32; without
    it, `oracle` judges."""
    return [_check(engine, oracle, judge or oracle, inputs, theirs, exact=exact) for inputs, theirs in batches]


def _check(
    engine: OurEngine, oracle: Peer, judge: Peer, inputs: CellInputs, theirs: EngineRun, *, exact: bool
) -> CheckResult:
    ours = engine.run(inputs)
    truth = judge.judge(inputs, ours.token_ids)
    result = CheckResult(
        cell=str(inputs.cell),
        exact_wanted=exact,
        token_agreement=token_agreement(ours.token_ids, theirs.token_ids),
        score_error=_mean_error(ours.scores, truth.scores),
        best_share=truth.best_share if inputs.cell.beam == 1 else None,
    )
    if judge is oracle or exact:
        return result
    # Each on the hypotheses it chose itself: a search prefers what its own rounding flatters.
    their_truth = judge.judge(inputs, theirs.token_ids)
    return dataclasses.replace(
        result,
        peer_score_error=_mean_error(oracle.judge(inputs, theirs.token_ids).scores, their_truth.scores),
        peer_best_share=their_truth.best_share,
    )


def _mean_error(scores: Sequence[float], truth: Sequence[float]) -> float:
    return float(np.abs(np.array(scores) - np.array(truth)).mean())
