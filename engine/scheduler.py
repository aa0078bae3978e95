"""Which sentence runs when: a waiting queue, slots and rows for those admitted, deadlines, cancellation. Torch-free.

Between two decode steps, sentences that left free rows and slots make room for waiting ones (continuous batching).
Order is first come, first served, with one bounded exception: a sentence whose beams do not fit yet may be overtaken by
later ones that do, at most MAX_OVERTAKES of them; then everything behind it waits until it fits.

Sentences whose shared work broke come back as suspects. They run again before anything else, among themselves only, in
groups that are halved at every further fault: the one that breaks its step ends up alone, and its mates do not.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.slots import FreeList
from engine.types import EngineFullError, FinishReason, Int32Array, RequestError, Timings, TranslationRequest

MAX_OVERTAKES = 32
MIN_FREE_SHARE = 1 / 4  # +25 % sentences/s over 0 on the CPU at 32 slots, beam 1; +13 % at beam 4
Clock = Callable[[], float]


class Status(enum.Enum):
    """Where a sentence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class GenerationState:
    """One sentence from submission to its end; mutable, owned by the scheduler.

    source_token_ids int32[S]. forced_token_id: the target language. max_tokens: generated tokens at most. deadline_s and
    the other times are seconds of the scheduler's clock. source_slot and beam_rows are set while RUNNING.
    num_overtakes: later sentences admitted before this one. max_group: None, or after a fault the most suspects that run
    together with this one, itself counted.
    """

    request: TranslationRequest
    source_token_ids: Int32Array
    forced_token_id: int
    max_tokens: int
    submitted_s: float = 0.0
    deadline_s: float | None = None
    status: Status = Status.WAITING
    source_slot: int = -1
    beam_rows: tuple[int, ...] = ()
    is_cancelled: bool = False
    num_overtakes: int = 0
    max_group: int | None = None
    admitted_s: float | None = None
    encoded_s: float | None = None
    finished_s: float | None = None

    @property
    def is_suspect(self) -> bool:
        """True after a fault in work that this sentence shared, or had to itself."""
        return self.max_group is not None

    @property
    def timings(self) -> Timings:
        """Seconds waiting (from submission), in the encoder pass, and from there to the end; valid once FINISHED."""
        end = self.finished_s if self.finished_s is not None else self.submitted_s
        admitted = self.admitted_s if self.admitted_s is not None else end
        encoded = self.encoded_s if self.encoded_s is not None else end
        return Timings(admitted - self.submitted_s, encoded - admitted, end - encoded)


class Scheduler:
    """Owns every sentence in the engine, and the free lists. Not thread-safe: one thread calls it."""

    def __init__(self, config: EngineConfig, *, clock: Clock = time.monotonic, epoch_clock: Clock = time.time) -> None:
        self._config = config
        self._clock = clock
        self._epoch_clock = epoch_clock
        self._rows = FreeList(config.max_rows)
        self._slots = FreeList(config.max_source_slots)
        self._inside: dict[str, GenerationState] = {}  # all of them, by request id
        self._waiting: dict[str, GenerationState] = {}  # by request id, in order of arrival
        self._running: dict[int, GenerationState] = {}  # by source slot; all of them suspects, or none
        # What `withdraw` goes by, so that a step in which nobody leaves looks at no sentence.
        self._has_cancelled = False
        self._next_deadline_s = math.inf  # no deadline in the engine is earlier

    @property
    def num_waiting(self) -> int:
        """Sentences not yet admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sentences that hold a slot and rows."""
        return len(self._running)

    @property
    def num_live_rows(self) -> int:
        """Rows taken by running sentences."""
        return self._config.max_rows - self._rows.num_free

    def check(self, state: GenerationState) -> None:
        """Raises RequestError for a sentence that could never run: too long, or more beams than rows."""
        beam_size, num_tokens = state.request.search.beam_size, len(state.source_token_ids)
        if beam_size > self._config.max_rows:
            raise RequestError("invalid_option", f"beam_size {beam_size} is more than max_rows {self._config.max_rows}")
        if num_tokens > self._config.max_source_tokens:
            raise RequestError(
                "source_too_long",
                f"the source has {num_tokens} tokens with language tag and eos; at most "
                f"{self._config.max_source_tokens} fit: split the text into sentences",
            )

    def submit(self, state: GenerationState) -> None:
        """Queue a new sentence. Raises RequestError as `check`, or for a request_id in use; EngineFullError when
        max_waiting sentences are queued.
        """
        self.check(state)
        request = state.request
        if request.request_id in self._inside:
            raise RequestError("invalid_option", f"request_id {request.request_id!r} is in use already")
        if len(self._waiting) >= self._config.max_waiting:
            raise EngineFullError(f"{len(self._waiting)} sentences are waiting (max_waiting); try again later")
        state.submitted_s = self._clock()
        if request.time_budget_s is not None:
            # arrived_at_s 0 means it arrived just now; a sender's clock ahead of ours cannot lengthen the budget.
            spent_s = max(0.0, self._epoch_clock() - request.arrived_at_s) if request.arrived_at_s else 0.0
            state.deadline_s = state.submitted_s + request.time_budget_s - spent_s
            self._next_deadline_s = min(self._next_deadline_s, state.deadline_s)
        self._inside[request.request_id] = self._waiting[request.request_id] = state

    def cancel(self, request_id: str) -> bool:
        """Mark a sentence; the next `withdraw` takes it out. False when it is not in the engine."""
        state = self._inside.get(request_id)
        if state is None:
            return False
        state.is_cancelled = self._has_cancelled = True
        return True

    def withdraw(self) -> list[tuple[GenerationState, FinishReason]]:
        """Take out what was cancelled or is past its deadline; slots and rows become free."""
        now = self._clock()
        if not self._has_cancelled and now < self._next_deadline_s:
            return []
        leaving = []
        self._has_cancelled, self._next_deadline_s = False, math.inf
        for state in (*self._waiting.values(), *self._running.values()):
            if state.is_cancelled:
                leaving.append((state, FinishReason.CANCELLED))
            elif state.deadline_s is None:
                continue
            elif now >= state.deadline_s:
                leaving.append((state, FinishReason.DEADLINE))
            else:
                self._next_deadline_s = min(self._next_deadline_s, state.deadline_s)
        for state, _ in leaving:
            self._release(state, now)
        return leaving

    def admit(self) -> list[GenerationState]:
        """Give slots and rows to waiting sentences, for one encoder pass of at most encode_token_budget tokens."""
        if not self._waiting:
            return []
        if self._running and next(iter(self._running.values())).is_suspect:
            return []  # whoever joined them would be hit by their fault
        if next(iter(self._waiting.values())).is_suspect:
            return self._admit_suspects()
        if not self._is_worth_a_pass():
            return []
        admitted: list[GenerationState] = []
        passed_over: list[GenerationState] = []
        num_tokens = 0
        for state in list(self._waiting.values()):
            blocked = bool(passed_over) and passed_over[0].num_overtakes >= MAX_OVERTAKES
            if blocked or len(passed_over) > MAX_OVERTAKES or not self._slots.num_free or not self._rows.num_free:
                break
            num_tokens_with = num_tokens + len(state.source_token_ids)
            fits = state.request.search.beam_size <= self._rows.num_free
            if not fits or num_tokens_with > self._config.encode_token_budget:
                passed_over.append(state)
                continue
            num_tokens = num_tokens_with
            self._start(state)
            admitted.append(state)
            for overtaken in passed_over:
                overtaken.num_overtakes += 1
        return admitted

    def _admit_suspects(self) -> list[GenerationState]:
        """The next group of suspects, once nothing runs; they ran together before, so rows and slots are enough."""
        if self._running:
            return []
        group: list[GenerationState] = []
        num_tokens = 0
        for state in list(self._waiting.values()):
            num_tokens += len(state.source_token_ids)
            limits = [member.max_group for member in (*group, state)]
            if (
                any(limit is None or limit <= len(group) for limit in limits)
                or num_tokens > self._config.encode_token_budget
            ):
                break
            self._start(state)
            group.append(state)
        return group

    def put_back(self, states: Sequence[GenerationState]) -> None:
        """After a fault in the work of these running sentences: back to the head of the queue in their order, as suspects
        that run in groups of half their number. Submission time and deadline stay.
        """
        max_group = max(1, len(states) // 2)
        for state in states:
            self._give_back(state)
            state.status = Status.WAITING
            state.source_slot, state.beam_rows = -1, ()
            state.admitted_s = state.encoded_s = None
            state.max_group = max_group
        self._waiting = {state.request.request_id: state for state in states} | self._waiting

    def _is_worth_a_pass(self) -> bool:
        """While everything that waits fits, it is let in at once. Under load, several sentences at a time: an encoder pass
        of one sentence reads almost as many expert weights as one of ten.
        """
        if not self._running:
            return True
        free_rows, free_slots = self._rows.num_free, self._slots.num_free
        shares = (free_rows / self._config.max_rows, free_slots / self._config.max_source_slots)
        if min(shares) >= MIN_FREE_SHARE:
            return True
        if len(self._waiting) > free_slots:
            return False
        return sum(state.request.search.beam_size for state in self._waiting.values()) <= free_rows

    def mark_encoded(self, states: Iterable[GenerationState]) -> None:
        """Note the end of the encoder pass of these sentences."""
        now = self._clock()
        for state in states:
            state.encoded_s = now

    def finish(self, source_slot: int) -> GenerationState:
        """The sentence in this slot is done: free its slot and rows, and give it back."""
        state = self._running[source_slot]
        self._release(state, self._clock())
        return state

    def running(self) -> list[GenerationState]:
        """Every sentence that holds a slot."""
        return list(self._running.values())

    def request_ids(self) -> list[str]:
        """Every sentence in the engine, waiting or running."""
        return list(self._inside)

    def _start(self, state: GenerationState) -> None:
        del self._waiting[state.request.request_id]
        (state.source_slot,) = self._slots.take(1)
        state.beam_rows = self._rows.take(state.request.search.beam_size)
        state.status = Status.RUNNING
        state.admitted_s = self._clock()
        self._running[state.source_slot] = state

    def _release(self, state: GenerationState, now: float) -> None:
        if state.status is Status.RUNNING:
            self._give_back(state)
        else:
            del self._waiting[state.request.request_id]
        del self._inside[state.request.request_id]
        state.status = Status.FINISHED
        state.finished_s = now

    def _give_back(self, state: GenerationState) -> None:
        del self._running[state.source_slot]
        self._slots.give_back((state.source_slot,))
        self._rows.give_back(state.beam_rows)
