"""Search whose every step runs on the device: the host only says which sentences take part, and reads finished ones back.

Same rules and results as `engine.search.search.Search`. Legend: R entries, G groups, P slots, T positions, V vocabulary.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.search.outcomes import outcomes
from engine.search.rules import ban_repeated_ngrams
from engine.search.spec import SearchOutcome, SearchSpec
from engine.search.transfer import copy_to_device, to_device
from kernels.beam_search import BeamTables, StepInputs, advance_sentences, begin_sentences, step_inputs
from kernels.beam_search.tables import BOUNDS_BY_MAX, NGRAM_SIZE, RECORD_FIELDS, STOPS_WHEN_FULL
from kernels.history_lists import HistoryLists

_SLOTS, _BEAMS, _GROUP_SLOTS, _GROUP_STARTS, _GROUP_COUNTS = range(5)
_CROWD = 64  # so many groups beyond the usual number: below, their turns cost less than a captured step of its own is worth
_CANDIDATES = (1, 8, 16)  # tokens kept an entry: greedy, up to 4 beams, up to 8; a captured step exists for each


@dataclass(eq=False, slots=True)
class _Sentence:
    """What the host knows. Steps are numbered as they are launched: it takes part from first_step, which feeds its start
    token, up to the one before stop_step, where it has max_tokens. is_live: not ended and not removed.
    """

    spec: SearchSpec
    source_slot: int
    ngram_size: int
    first_step: int
    stop_step: int
    is_live: bool = True


class StepShape(NamedTuple):
    """What a captured step depends on: entries (padded), candidates an entry, n-gram sizes that any sentence bans, and
    whether it has many more groups than sentences with all their beams would make: then there are programs for every group,
    where groups beyond the usual number would be taken in turns."""

    num_entries: int
    num_candidates: int
    ngram_sizes: tuple[int, ...]
    is_crowded: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """Who takes part in a step: the sentences, their slots int32[B], and the first step that needs another composition."""

    sentences: list[_Sentence]
    slots: NDArray[np.int32]
    shape: StepShape
    stop_step: int


class DeviceSearch:
    """Sentences of any beam sizes, advanced together. Each step: `plan`, then `feed`, a decoder call and `advance` (these
    three can be captured), then `took`."""

    def __init__(
        self,
        *,
        num_slots: int,
        num_rows: int,
        max_target_tokens: int,
        start_token_id: int,
        eos_token_id: int,
        entry_buckets: Sequence[int],
        device: torch.device,
        lists_from: int | None = None,
    ) -> None:
        """lists_from: the least number of entries of a step that lists the cells of their histories; None: no step does."""
        self.tables = BeamTables.allocate(
            num_slots=num_slots, num_rows=num_rows, max_target_tokens=max_target_tokens, device=device
        )
        self._start_token_id, self._eos_token_id = start_token_id, eos_token_id
        self._buckets = tuple(entry_buckets)
        self._results: NDArray[np.int32] = self.tables.results.numpy()
        self._reported: NDArray[np.int32] = self.tables.reported.numpy()
        self._plan = torch.zeros((5, self._buckets[-1]), dtype=torch.int32, device=device)
        self._inputs = StepInputs.allocate(self._buckets[-1], device)
        self._lists_from = lists_from
        self._lists: HistoryLists | None = None
        if lists_from is not None and self._buckets[-1] >= lists_from:
            self._lists = HistoryLists.allocate(
                self._buckets[-1], num_rows=num_rows, max_positions=max_target_tokens, device=device
            )
        self._sentences: list[_Sentence] = []  # in order of their first steps
        self._num_beams = np.zeros(num_slots, dtype=np.int32)  # by slot
        self._num_steps = 0  # launched so far: the number of the next one
        self._planned: Composition | None = None  # what is on the device, None when it is stale

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of entries that steps are padded to."""
        return self._buckets

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._plan.device

    def add(self, specs: Sequence[SearchSpec]) -> None:
        """Begin sentences; their rows and slots must be free."""
        if not specs:
            return
        width = self.tables.num_positions + 1
        norms = np.stack([_normalizers(spec.options.length_penalty, width) for spec in specs])
        records = np.array([_record(spec) for spec in specs], dtype=np.int32)
        begin_sentences(
            to_device(records, self.device),
            to_device(norms, self.device),
            self.tables,
            start_token_id=self._start_token_id,
        )
        self._num_beams[records[:, 0]] = records[:, 1]
        step = self._num_steps
        for spec in specs:
            ngram_size, stop_step = spec.options.no_repeat_ngram_size, step + spec.max_tokens - 1
            self._sentences.append(_Sentence(spec, spec.source_slot, ngram_size, step, stop_step))
        self._planned = None

    def remove(self, source_slots: Collection[int]) -> None:
        """Drop sentences without a result."""
        self._drop([s for s in self._sentences if s.source_slot in source_slots])

    def clear(self) -> None:
        """Drop every sentence without a result, touching no device memory."""
        self._drop(self._sentences)
        self._planned = None

    def plan(self) -> StepShape | None:
        """Bring the composition of the next step to the device; None when every sentence is at its length limit."""
        if self._planned is None or self._num_steps >= self._planned.stop_step:
            fed = [s for s in self._sentences if s.stop_step > self._num_steps]
            self._planned = self._upload(fed) if fed else None
        return None if self._planned is None else self._planned.shape

    def plan_idle(self) -> None:
        """Bring a step of idle entries to the device, for a capture."""
        self._planned = None
        self._plan.zero_()
        self._plan[_SLOTS].fill_(-1)
        self._plan[_GROUP_SLOTS].fill_(-1)

    def feed(self, shape: StepShape) -> StepInputs:
        """What the entries feed the decoder."""
        r, whole = shape.num_entries, self._inputs
        out = StepInputs(whole.token_ids[:r], whole.positions[:r], whole.rows[:r], whole.active[:r], whole.banned[:r])
        lists = self.history_lists(shape)
        return step_inputs(
            self._plan[_SLOTS, :r],
            self._plan[_BEAMS, :r],
            self.tables,
            start_token_id=self._start_token_id,
            eos_token_id=self._eos_token_id,
            out=out,
            groups=None if lists is None else self.groups(shape),
            lists=lists,
        )

    def history_lists(self, shape: StepShape) -> HistoryLists | None:
        """Where `feed` lists the cells of the groups' histories; None for a step of too few entries to gain by it."""
        if self._lists is None or self._lists_from is None or shape.num_entries < self._lists_from:
            return None
        return self._lists.first(shape.num_entries)

    def groups(self, shape: StepShape) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, first entries and counts of the runs of entries of one sentence, int32[R] each."""
        r = shape.num_entries
        return self._plan[_GROUP_SLOTS, :r], self._plan[_GROUP_STARTS, :r], self._plan[_GROUP_COUNTS, :r]

    def usual_groups(self, shape: StepShape) -> int:
        """How many groups a step of this shape has: where every sentence has all the beams that its candidates are for, 1, 4
        or 8, unless it is crowded. New sentences have two entries, and two groups, each in their first step."""
        return shape.num_entries if shape.is_crowded else _usual_groups(shape.num_entries, shape.num_candidates)

    def advance(self, shape: StepShape, values: Tensor, token_ids: Tensor) -> None:
        """One token for every sentence, from its entries' best tokens: fp32 and int32 [R, K]."""
        advance_sentences(
            values,
            token_ids,
            *self.groups(shape),
            self._plan[_BEAMS, : shape.num_entries],
            self.tables,
            eos_token_id=self._eos_token_id,
        )

    def best_allowed(
        self, shape: StepShape, best: tuple[Tensor, Tensor], logprobs: Tensor, inputs: StepInputs
    ) -> tuple[Tensor, Tensor]:
        """(values, token ids) [R, K] where n-gram rules ban tokens. logprobs float32[R, V], before any ban, is overwritten.

        best: values and ids without these rules; entries of sentences that have none keep them, so that their bits do not
        depend on whether a mate has some.
        """
        broken = logprobs[:, :1].isnan()
        banned = inputs.banned.long()[:, None]
        place = banned.clamp(min=0)
        logprobs.scatter_(1, place, torch.where(banned >= 0, float("-inf"), logprobs.gather(1, place)))
        rows = inputs.rows.long().clamp(min=0)
        ancestry = self.tables.ancestry[rows].long()
        prefixes = self.tables.history[ancestry, torch.arange(ancestry.shape[1], device=self.device), 0].long()
        slots = self._plan[_SLOTS, : shape.num_entries].long().clamp(min=0)
        sizes = self.tables.sentences[slots, NGRAM_SIZE].long()
        for size in shape.ngram_sizes:
            ban_repeated_ngrams(logprobs, prefixes, inputs.positions.long(), sizes, size)
        values, token_ids = logprobs.topk(min(shape.num_candidates, logprobs.shape[1]))
        has_rule = (sizes > 0)[:, None]
        values = torch.where(has_rule, values.masked_fill(broken, float("nan")), best[0])
        return values, torch.where(has_rule, token_ids.int(), best[1])

    def took(self) -> Composition:
        """Note that the planned step is launched; returns who takes part in it."""
        assert self._planned is not None
        self._num_steps += 1
        return self._planned

    def close(self, composition: Composition) -> list[_Sentence]:
        """Take out the sentences of a step that is over and that have ended, in it or in one launched since; those removed
        meanwhile are left out.

        Their slots must stay untouched until `read`.
        """
        ended = self._reported[composition.slots].nonzero()[0].tolist()
        closed = [s for s in (composition.sentences[i] for i in ended) if s.is_live]
        if closed:
            self._drop(closed)
        return closed

    def read(self, closed: Sequence[_Sentence]) -> list[SearchOutcome]:
        """Results of sentences that were closed."""
        limits = [sentence.spec.options.num_hypotheses for sentence in closed]
        slots = [sentence.source_slot for sentence in closed]
        return outcomes(self._results[: max(limits)], slots, limits, self._reported)

    def _drop(self, sentences: Sequence[_Sentence]) -> None:
        for sentence in sentences:
            sentence.is_live = False
        self._sentences = [s for s in self._sentences if s.is_live]
        if any(s.stop_step > self._num_steps for s in sentences):  # the others are left out already
            self._planned = None

    def _upload(self, fed: list[_Sentence]) -> Composition:
        step = self._num_steps
        slots = np.array([s.source_slot for s in fed], dtype=np.int32)
        first_new = bisect.bisect_left(fed, step, key=lambda s: s.first_step)
        new = slots[first_new:]
        counts = self._num_beams[slots]
        beams = int(counts.max())
        counts[first_new:] = 1  # all beams of a new sentence are alike, and only the first may branch
        stops = np.cumsum(counts, dtype=np.int32)
        starts, rows = stops - counts, int(stops[-1])
        num_entries, num_groups = rows + len(new), len(fed) + len(new)
        plan = np.zeros((5, self._buckets[-1]), dtype=np.int32)
        plan[_SLOTS] = plan[_GROUP_SLOTS] = -1
        plan[_SLOTS, :rows] = np.repeat(slots, counts)
        plan[_SLOTS, rows:num_entries] = new
        plan[_BEAMS, :rows] = np.arange(rows, dtype=np.int32) - np.repeat(starts, counts)
        plan[_BEAMS, rows:num_entries] = -1
        plan[_GROUP_SLOTS, : len(fed)] = slots
        plan[_GROUP_SLOTS, len(fed) : num_groups] = new
        plan[_GROUP_STARTS, : len(fed)] = starts
        plan[_GROUP_STARTS, len(fed) : num_groups] = np.arange(rows, num_entries, dtype=np.int32)
        plan[_GROUP_COUNTS, : len(fed)] = counts
        plan[_GROUP_COUNTS, len(fed) : num_groups] = 1
        copy_to_device(self._plan, plan)
        candidates = 1 if beams == 1 else next(k for k in _CANDIDATES if k >= 2 * beams)
        ngrams = tuple(sorted({s.ngram_size for s in fed} - {0}))
        bucket = self._buckets[bisect.bisect_left(self._buckets, num_entries)]
        # start tokens are fed once, so a step with new sentences is followed by another composition
        stop_step = step + 1 if len(new) else min(s.stop_step for s in fed)
        is_crowded = num_groups >= _usual_groups(bucket, candidates) + _CROWD
        return Composition(fed, slots, StepShape(bucket, candidates, ngrams, is_crowded), stop_step)


def _usual_groups(num_entries: int, num_candidates: int) -> int:
    return -(-num_entries // max(1, num_candidates // 2))


def _record(spec: SearchSpec) -> list[int]:
    options = spec.options
    flags = STOPS_WHEN_FULL * (options.early_stopping is True)
    flags += BOUNDS_BY_MAX * (options.early_stopping == "never" and options.length_penalty > 0)
    head = [spec.source_slot, len(spec.beam_rows), spec.max_tokens, options.min_target_tokens, flags]
    head += [spec.forced_token_id, options.no_repeat_ngram_size, 0, *spec.beam_rows]
    return head + [0] * (RECORD_FIELDS - len(head))


@functools.lru_cache(maxsize=256)
def _normalizers(length_penalty: float, width: int) -> NDArray[np.float32]:
    """float32[width]: n ** length_penalty computed in float64; entry 0 is not used."""
    lengths = torch.arange(width, dtype=torch.float64).clamp(min=1)
    return (lengths**length_penalty).float().numpy()
