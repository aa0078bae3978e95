"""How tokens spread over experts: the counts that passes leave on the device, read without making it wait.

Legend: L sparse layers of a stack, E experts. A pass leaves int32[L, E] in a fixed buffer (StackLoad), which the next pass
of its stack overwrites. On a CPU every pass is read. On a GPU every encoder pass and one decode step of 17 is: a copy to
pinned memory, about 2 us behind a pass, that is looked at when a later pass has been launched; passes that follow while such
a copy is under way are left out. Adding up on the device would be exact, but each way costs every step: a launch at its end
about 2 us, a read of the sums in the router's last program about 1 us a layer, which is 1 % or more of a step of one row.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.model.mixture_of_experts import StackLoad
from engine.types import ExpertLoad

_STEPS_A_SAMPLE = 17  # prime: sentences that all start together must not be met at the same positions again and again
_RECENT_TOKENS = 64  # an expert: with them a uniform router over 128 experts shows a skew of about 1.3


class ExpertLoadMeter:
    """Both stages of one engine. Say after each launch which kind of pass it was, on the stream that it was launched on."""

    def __init__(self, encoder: StackLoad, decoder: StackLoad) -> None:
        self._encode = _Stage("encode", encoder, every=1)
        self._decode = _Stage("decode", decoder, every=_STEPS_A_SAMPLE if decoder.tokens_per_expert.is_cuda else 1)

    @property
    def loads(self) -> tuple[ExpertLoad, ...]:
        """What has arrived by now."""
        for stage in (self._encode, self._decode):
            stage.collect()
        return tuple(stage.load for stage in (self._encode, self._decode) if stage.load is not None)

    def encoded(self) -> None:
        """An encoder pass has been launched."""
        self._encode.passed()

    def decoded(self) -> None:
        """A decode step has been launched."""
        self._decode.passed()


class _Stage:
    """One stage's counts: the copy under way, and the sums."""

    def __init__(self, stage: Literal["encode", "decode"], source: StackLoad, *, every: int) -> None:
        self.load: ExpertLoad | None = None
        self._stage = stage
        self._source = source
        self._every = every
        on_gpu = source.tokens_per_expert.is_cuda
        self._copy: Tensor = torch.zeros(source.tokens_per_expert.shape, dtype=torch.int32, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._is_under_way = False
        self._num_launched = 0
        self._num_passes = 0
        shape = (len(source.layers), source.num_experts)
        self._num_tokens = np.zeros(shape[0], dtype=np.int64)
        self._num_active = np.zeros(shape[0], dtype=np.int64)
        self._recent = np.zeros((2, *shape), dtype=np.int64)  # the window that fills, and the full one before it

    def passed(self) -> None:
        """Count a pass, and begin to copy what it leaves when it is due."""
        self.collect()
        self._num_launched += 1
        if self._is_under_way or self._num_launched % self._every or not self._source.layers:
            return
        self._copy.copy_(self._source.tokens_per_expert, non_blocking=True)
        self._is_under_way = True
        if self._copied is not None:
            self._copied.record()

    def collect(self) -> None:
        """Add up the copy under way, if it has arrived."""
        if not self._is_under_way or not self._has_arrived():
            return
        self._is_under_way = False
        counts: NDArray[Any] = self._copy.numpy()[:, : self._source.num_experts]
        if not counts.any():  # a pass of padding
            return
        self._num_passes += 1
        self._num_tokens += counts.sum(axis=1)
        self._num_active += np.count_nonzero(counts, axis=1)
        self._recent[0] += counts
        self.load = self._snapshot()
        if self._recent[0, 0].sum() >= _RECENT_TOKENS * counts.shape[1]:
            self._recent[1] = self._recent[0]
            self._recent[0] = 0

    def _has_arrived(self) -> bool:
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def _snapshot(self) -> ExpertLoad:
        recent = self._recent.sum(axis=0)
        busiest, total = recent.max(axis=1), recent.sum(axis=1)
        return ExpertLoad(
            stage=self._stage,
            layers=self._source.layers,
            num_passes=self._num_passes,
            num_tokens=tuple(self._num_tokens.tolist()),
            num_active=tuple(self._num_active.tolist()),
            skew=tuple((busiest * recent.shape[1] / total).tolist()),
            busiest_share=tuple((busiest / total).tolist()),
        )
