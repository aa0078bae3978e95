"""What the ops of kernels.replay_check's step are made of: buffers, random weights, an op with its slow twin.

N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.replay_memory import Arena, StepSizes, Views, inputs_of, layout_of, tables_of
from kernels.replay_search import Sentence
from kernels.row_statistics import RowStatistics
from kernels.small_linear import (
    FoldedLinear,
    Int8Linear,
    fold_norm,
    linear_scratch,
    small_linear,
    small_linear_reference,
)
from kernels.testing import relative_error

Twin = Callable[[Views, Views, list[Sentence]], float]
PAD = 1


@dataclass(frozen=True, slots=True)
class Op:
    """One launch. writes: the buffers it may change. twin(before, after, sentences): its error, judged by limit."""

    name: str
    launch: Callable[[], object]
    writes: tuple[str, ...]
    twin: Twin
    limit: float


class Parts:
    """The step's memory, its scratch, and random weights, which are drawn once and never change."""

    def __init__(self, sizes: StepSizes, dtype: torch.dtype, device: torch.device, limit: float) -> None:
        self.sizes, self.dtype, self.device, self.limit = sizes, dtype, device, limit
        self.arena = Arena(layout_of(sizes, dtype), device)
        self.generator = torch.Generator(device).manual_seed(0)
        d, f = sizes.d_model, sizes.d_ff
        shapes = [(3 * d, d, True), (d, d, True), (d, d, False), (f, d, True), (d, f, False)]
        self.scratch = linear_scratch(shapes, max(sizes.entries, sizes.source_tokens), dtype, device)
        self.statistics = RowStatistics.allocate(sizes.entries, d, device)  # of "x", from the writers that leave them
        self.tables, self.inputs = tables_of(self.arena.views), inputs_of(self.arena.views)
        self.table = self.draw(sizes.vocab, d, scale=d**-0.5)
        self.table[0] = float("nan")  # idle entries and padding are fed token 0
        self.places = self.draw(max(sizes.target_positions, sizes.source_positions) + 4, d)

    def draw(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers of this size."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def linear(self, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [N, K] and bias [N]."""
        return self.draw(n, k, scale=k**-0.5), self.draw(n, scale=0.1)

    def folded(self, n: int, k: int, *, int8: bool = False) -> FoldedLinear:
        """The same with a layer norm folded in."""
        weight, bias = self.linear(n, k)
        return fold_norm(weight, bias, 1 + self.draw(k, scale=0.1), self.draw(k, scale=0.1), 1e-5, int8=int8)

    def small_linear(
        self,
        name: str,
        source: str,
        weight: torch.Tensor | Int8Linear | FoldedLinear,
        bias: torch.Tensor | None,
        target: str,
        *,
        relu: bool = False,
        add: bool = False,
    ) -> Op:
        """`small_linear` from one buffer into another, or added to it."""
        v = self.arena.views

        def launch() -> None:
            into = {"residual": v[target]} if add else {"out": v[target]}
            known = self.statistics if "x" in (source, target) else None
            small_linear(v[source], weight, bias, relu=relu, scratch=self.scratch, statistics=known, **into)  # type: ignore[arg-type]

        def twin(was: Views, now: Views, _: list[Sentence]) -> float:
            residual = was[target] if add else None
            truth = small_linear_reference(was[source], weight, bias, relu=relu, residual=residual)
            return error_of_finite_rows(now[target], truth, was[source] if residual is None else truth)

        return Op(name, launch, (target,), twin, self.limit)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN where NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def error_of_finite_rows(found: torch.Tensor, truth: torch.Tensor, source: torch.Tensor) -> float:
    """Relative error over the rows whose source has no NaN; NaN in such a row of the result counts."""
    rows = ~source.isnan().any(1)
    return relative_error(found[rows], truth[rows])
