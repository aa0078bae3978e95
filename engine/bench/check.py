"""Is an engine right? Its tokens beside transformers', and its hypotheses judged by transformers.

Free-running tokens of two right bf16 implementations differ sooner or later, since a near tie may fall either way and the
rest of a sentence follows. So the gate in half precision reads the engine's own hypotheses with transformers (all positions
at once, no cache): the scores must agree, and greedy tokens must be transformers' best ones. Measured in bf16 on a random
model of 24 + 12 layers, mean score error and share of best tokens: 0.010 and 0.95 for a right engine, 0.17 and 0.90 without
the factor 0.8 on expert outputs, 0.08 and 0.86 with the experts of one layer left out. In fp32 every token must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.bench.engine_run import EngineRun
from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine
from engine.bench.peers import Judgement, Peer
from engine.bench.shapes import Cell
from engine.types import Int32Array

CHECK_CELLS = (Cell(32, 1), Cell(16, 4))
MAX_SCORE_ERROR = 0.025
MIN_BEST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check batch. token_agreement: share of equal tokens, free-running; score_error: mean absolute difference."""

    cell: str
    exact_wanted: bool
    token_agreement: float
    score_error: float
    best_share: float | None

    @property
    def failure(self) -> str | None:
        """What is wrong, or None."""
        if self.exact_wanted:
            if self.token_agreement < 1.0:
                return f"{self.cell}: only {self.token_agreement:.1%} of the tokens equal transformers' in fp32"
            return None
        if not self.score_error <= MAX_SCORE_ERROR:
            return f"{self.cell}: scores differ from transformers' by {self.score_error:.4f} (limit {MAX_SCORE_ERROR})"
        if self.best_share is not None and not self.best_share >= MIN_BEST_SHARE:
            return f"{self.cell}: {self.best_share:.1%} of the tokens are transformers' best (limit {MIN_BEST_SHARE:.0%})"
        return None


def token_agreement(ours: Int32Array, theirs: Int32Array) -> float:
    """Share of equal tokens at equal places, int32[B, T] both."""
    return float((ours == theirs).mean())


def compare(inputs: CellInputs, ours: EngineRun, theirs: EngineRun, judgement: Judgement, *, exact: bool) -> CheckResult:
    """Put the figures of one batch together."""
    return CheckResult(
        cell=str(inputs.cell),
        exact_wanted=exact,
        token_agreement=token_agreement(ours.token_ids, theirs.token_ids),
        score_error=float(np.abs(np.array(ours.scores) - np.array(judgement.scores)).mean()),
        best_share=judgement.best_share if inputs.cell.beam == 1 else None,
    )


def check_engine(
    engine: OurEngine, oracle: Peer, batches: list[tuple[CellInputs, EngineRun]], *, exact: bool
) -> list[CheckResult]:
    """Run the check batches (inputs and transformers' own output) through our engine."""
    results = []
    for inputs, theirs in batches:
        ours = engine.run(inputs)
        results.append(compare(inputs, ours, theirs, oracle.judge(inputs, ours.token_ids), exact=exact))
    return results
