"""Search whose every step runs on the device: the host only says which sentences take part, and reads finished ones back.

Same rules and results as `engine.search.search.Search`. Legend: R entries, G groups, P slots, T positions, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.search.rules import ban_repeated_ngrams
from engine.search.spec import ScoredTokens, SearchOutcome, SearchSpec
from engine.search.transfer import to_device, to_host
from kernels.beam_search import BeamTables, StepInputs, advance_sentences, begin_sentences, step_inputs
from kernels.beam_search.tables import BOUNDS_BY_MAX, BROKEN, NGRAM_SIZE, RECORD_FIELDS, STOPS_WHEN_FULL

_SLOTS, _BEAMS, _GROUP_SLOTS, _GROUP_STARTS, _GROUP_COUNTS = range(5)
_CANDIDATES = (1, 8, 16)  # tokens kept an entry: greedy, up to 4 beams, up to 8; a captured step exists for each


@dataclass(eq=False, slots=True)
class _Sentence:
    """What the host knows: num_tokens generated so far, the step being launched included."""

    spec: SearchSpec
    num_tokens: int = 1
    is_new: bool = True  # its start token is not fed yet


class StepShape(NamedTuple):
    """What a captured step depends on: entries (padded), candidates an entry, n-gram sizes that any sentence bans."""

    num_entries: int
    num_candidates: int
    ngram_sizes: tuple[int, ...]


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
    ) -> None:
        self.tables = BeamTables.allocate(
            num_slots=num_slots, num_rows=num_rows, max_target_tokens=max_target_tokens, device=device
        )
        self._start_token_id, self._eos_token_id = start_token_id, eos_token_id
        self._buckets = tuple(entry_buckets)
        self._plan = torch.zeros((5, self._buckets[-1]), dtype=torch.int32, device=device)
        self._inputs = StepInputs.allocate(self._buckets[-1], device)
        self._sentences: list[_Sentence] = []
        self._planned: list[_Sentence] | None = None  # the composition that is on the device, None when it is stale
        self._shape = StepShape(self._buckets[0], 1, ())

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
        begin_sentences(
            to_device(np.array([_record(spec) for spec in specs], dtype=np.int32), self.device),
            to_device(norms, self.device),
            self.tables,
            start_token_id=self._start_token_id,
        )
        self._sentences += [_Sentence(spec) for spec in specs]
        self._planned = None

    def remove(self, source_slots: Collection[int]) -> None:
        """Drop sentences without a result."""
        self._sentences = [s for s in self._sentences if s.spec.source_slot not in source_slots]
        self._planned = None

    def clear(self) -> None:
        """Drop every sentence without a result, touching no device memory."""
        self._sentences = []
        self._planned = None

    def plan(self) -> StepShape | None:
        """Bring the composition of the next step to the device; None when every sentence is at its length limit."""
        if self._planned is None or any(s.is_new or s.num_tokens >= s.spec.max_tokens for s in self._planned):
            fed = [s for s in self._sentences if s.num_tokens < s.spec.max_tokens]
            if not fed:
                self._planned = None
                return None
            self._planned = fed
            self._shape = self._upload(fed)
        return self._shape

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
        return step_inputs(
            self._plan[_SLOTS, :r],
            self._plan[_BEAMS, :r],
            self.tables,
            start_token_id=self._start_token_id,
            eos_token_id=self._eos_token_id,
            out=out,
        )

    def groups(self, shape: StepShape) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, first entries and counts of the runs of entries of one sentence, int32[R] each."""
        r = shape.num_entries
        return self._plan[_GROUP_SLOTS, :r], self._plan[_GROUP_STARTS, :r], self._plan[_GROUP_COUNTS, :r]

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

    def took(self) -> list[_Sentence]:
        """Note that the planned step is launched; returns the sentences that take part in it."""
        assert self._planned is not None
        for sentence in self._planned:
            sentence.num_tokens += 1
        fed = self._planned
        if any(sentence.is_new for sentence in fed):
            for sentence in fed:
                sentence.is_new = False
            self._planned = None
        return fed

    def close(self, fed: Sequence[_Sentence], status: NDArray[np.int32]) -> list[_Sentence]:
        """Take out the sentences of a step that have ended by its status int32[P]; those removed meanwhile are left out.

        Their rows and slots must stay untouched until `read`.
        """
        if not status.any():
            return []
        live = set(map(id, self._sentences))
        closed = [s for s in fed if status[s.spec.source_slot] and id(s) in live]
        if closed:
            gone = set(map(id, closed))
            self._sentences = [s for s in self._sentences if id(s) not in gone]
            self._planned = None
        return closed

    def read(self, closed: Sequence[_Sentence], status: NDArray[np.int32]) -> list[SearchOutcome]:
        """Results of sentences that were closed with this status; waits for the current stream only."""
        slots = to_device(np.array([s.spec.source_slot for s in closed], dtype=np.int32), self.device)
        rows = to_device(np.array([row for s in closed for row in s.spec.beam_rows], dtype=np.int32), self.device)
        length = max(s.num_tokens for s in closed) + 1
        tables = self.tables
        hypotheses, scores, history = to_host(
            tables.hypotheses.index_select(0, slots),
            tables.hypothesis_score.index_select(0, slots),
            tables.history[:, :length].index_select(0, rows),
        )
        outcomes, start = [], 0
        for i, sentence in enumerate(closed):
            stop = start + len(sentence.spec.beam_rows)
            is_broken = bool(status[sentence.spec.source_slot] == BROKEN)
            found = [] if is_broken else _trace(history[start:stop], hypotheses[i], scores[i], sentence.spec)
            outcomes.append(_outcome(sentence.spec, found, is_broken=is_broken))
            start = stop
        return outcomes

    def _upload(self, fed: Sequence[_Sentence]) -> StepShape:
        slots = np.array([s.spec.source_slot for s in fed], dtype=np.int32)
        counts = np.array([len(s.spec.beam_rows) for s in fed], dtype=np.int32)
        new = np.array([s.spec.source_slot for s in fed if s.is_new], dtype=np.int32)
        starts = np.cumsum(counts, dtype=np.int32) - counts
        rows = int(counts.sum())
        num_entries, num_groups = rows + len(new), len(fed) + len(new)
        plan = np.zeros((5, self._buckets[-1]), dtype=np.int32)
        plan[_SLOTS] = plan[_GROUP_SLOTS] = -1
        plan[_SLOTS, :rows] = np.repeat(slots, counts)
        plan[_BEAMS, :rows] = np.arange(rows, dtype=np.int32) - np.repeat(starts, counts)
        plan[_SLOTS, rows:num_entries] = new
        plan[_BEAMS, rows:num_entries] = -1
        plan[_GROUP_SLOTS, :num_groups] = np.concatenate([slots, new])
        plan[_GROUP_STARTS, :num_groups] = np.concatenate([starts, np.arange(rows, num_entries, dtype=np.int32)])
        plan[_GROUP_COUNTS, :num_groups] = np.concatenate([counts, np.ones_like(new)])
        self._plan.copy_(to_device(plan, self.device))
        beams = int(counts.max())
        candidates = 1 if beams == 1 else next(k for k in _CANDIDATES if k >= 2 * beams)
        ngrams = tuple(sorted({s.spec.options.no_repeat_ngram_size for s in fed} - {0}))
        return StepShape(next(b for b in self._buckets if b >= num_entries), candidates, ngrams)


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


def _trace(
    history: NDArray[np.int32], hypotheses: NDArray[np.int32], scores: NDArray[np.float32], spec: SearchSpec
) -> list[ScoredTokens]:
    """Finished hypotheses of one sentence, best first: their tokens from the forced one on, followed back through their
    parents. history [beams, T, 2]; hypotheses [8, 4] and scores [8] as in BeamTables."""
    width = history.shape[1]
    cells = history.reshape(
        -1
    ).tolist()  # one flat list: nested ones would be thousands of objects for the garbage collector
    found: list[ScoredTokens] = []
    for (is_done, beam, last, length), score in zip(hypotheses.tolist(), scores.tolist(), strict=True):
        if not is_done or len(found) == spec.options.num_hypotheses:
            break
        tokens, origin = [last], beam
        for t in range(length - 1, 0, -1):
            place = 2 * (origin * width + t)
            tokens.append(cells[place])
            origin = cells[place + 1]
        found.append(ScoredTokens(tuple(tokens[::-1]), score))
    return found


def _outcome(spec: SearchSpec, hypotheses: Sequence[ScoredTokens], *, is_broken: bool) -> SearchOutcome:
    if is_broken:
        return SearchOutcome(spec.source_slot, (), "the model's logits are not finite; load it in a wider precision")
    if not hypotheses:
        return SearchOutcome(spec.source_slot, (), "the search options banned every token, so no hypothesis exists")
    return SearchOutcome(spec.source_slot, tuple(hypotheses))
