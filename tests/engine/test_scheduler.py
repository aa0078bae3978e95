"""The scheduler on its own: random lives of many sentences, order, deadlines, bounds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.config import EngineConfig
from engine.scheduler import MAX_OVERTAKES, MIN_FREE_SHARE, GenerationState, Scheduler, Status
from engine.types import EngineFullError, FinishReason, RequestError, SearchOptions, TranslationRequest

CONFIG = EngineConfig(
    precision="fp32", max_rows=10, max_source_slots=4, max_source_tokens=12, encode_token_budget=16, max_waiting=6
)


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def make_state(
    request_id: str, *, beam_size: int = 1, num_tokens: int = 3, time_budget_s: float | None = None, arrived_at_s: float = 0
) -> GenerationState:
    search = SearchOptions(beam_size=beam_size)
    request = TranslationRequest(request_id, "x", "eng_Latn", "fra_Latn", search, arrived_at_s, time_budget_s)
    return GenerationState(request, np.ones(num_tokens, dtype=np.int32), forced_token_id=5, max_tokens=9)


class SchedulerLife(RuleBasedStateMachine):
    """Any order of arrivals, admissions, endings, cancellations and passing time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(100.0)
        self.scheduler = Scheduler(CONFIG, clock=self.clock, epoch_clock=Clock(0.0))
        self.inside: dict[str, GenerationState] = {}
        self.num_submitted = 0
        self.ends: dict[str, int] = {}
        self.arrival: dict[str, int] = {}
        self.admission_order: list[str] = []

    @rule(beam_size=st.integers(1, 8), num_tokens=st.integers(1, 12), budget=st.none() | st.integers(1, 9))
    def submit(self, beam_size: int, num_tokens: int, budget: int | None) -> None:
        request_id = f"r{self.num_submitted}"
        state = make_state(request_id, beam_size=beam_size, num_tokens=num_tokens, time_budget_s=budget)
        was_full = self.scheduler.num_waiting >= CONFIG.max_waiting
        try:
            self.scheduler.submit(state)
        except EngineFullError:
            assert was_full
            return
        assert not was_full
        self.inside[request_id] = state
        self.arrival[request_id] = self.num_submitted
        self.num_submitted += 1

    @rule()
    def admit(self) -> None:
        admitted = self.scheduler.admit()
        assert sum(len(state.source_token_ids) for state in admitted) <= CONFIG.encode_token_budget
        self.admission_order += [state.request.request_id for state in admitted if not state.is_suspect]
        self.scheduler.mark_encoded(admitted)

    @precondition(lambda self: self.scheduler.num_running)
    @rule()
    def put_back(self) -> None:
        """A fault in a step; a suspect that was alone would fail instead."""
        running = self.scheduler.running()
        if len(running) == 1 and running[0].is_suspect:
            return
        before = {state.request.request_id: (state.submitted_s, state.deadline_s) for state in running}
        groups = [state.max_group or CONFIG.max_source_slots + 1 for state in running]
        self.scheduler.put_back(running)
        for state, group in zip(running, groups, strict=True):
            assert state.status is Status.WAITING
            assert before[state.request.request_id] == (state.submitted_s, state.deadline_s)
            assert (state.max_group or 0) < group

    @precondition(lambda self: self.scheduler.num_running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        state = data.draw(st.sampled_from(self.scheduler.running()))
        assert self.scheduler.finish(state.source_slot) is state
        self.end(state)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([*self.inside, "stranger"]))
        assert self.scheduler.cancel(request_id) == (request_id in self.inside)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @rule()
    def withdraw(self) -> None:
        for state, reason in self.scheduler.withdraw():
            overdue = state.deadline_s is not None and self.clock.now_s >= state.deadline_s
            assert state.is_cancelled if reason is FinishReason.CANCELLED else overdue
            self.end(state)
        assert not any(s.is_cancelled or (s.deadline_s or 1e9) <= self.clock.now_s for s in self.inside.values())

    def end(self, state: GenerationState) -> None:
        assert state.status is Status.FINISHED
        request_id = state.request.request_id
        self.ends[request_id] = self.ends.get(request_id, 0) + 1
        del self.inside[request_id]  # a second end of the same sentence is a KeyError here
        assert min(state.timings.queue_s, state.timings.encode_s, state.timings.decode_s) >= 0

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        assert sorted(self.scheduler.request_ids()) == sorted(self.inside)
        running = self.scheduler.running()
        rows = [row for state in running for row in state.beam_rows]
        slots = [state.source_slot for state in running]
        assert len(set(rows)) == len(rows) == self.scheduler.num_live_rows <= CONFIG.max_rows
        assert len(set(slots)) == len(slots) == self.scheduler.num_running <= CONFIG.max_source_slots
        assert set(rows) <= set(range(CONFIG.max_rows))
        assert set(slots) <= set(range(CONFIG.max_source_slots))
        assert all(len(state.beam_rows) == state.request.search.beam_size for state in running)
        new = [state for state in self.inside.values() if state.status is Status.WAITING and not state.is_suspect]
        assert len(new) <= CONFIG.max_waiting

    @invariant()
    def suspects_run_among_themselves(self) -> None:
        running = self.scheduler.running()
        if any(state.is_suspect for state in running):
            assert all(state.max_group is not None and len(running) <= state.max_group for state in running)

    @invariant()
    def overtaking_is_bounded(self) -> None:
        for state in self.inside.values():
            later = self.arrival[state.request.request_id]
            if state.status is Status.WAITING and not state.is_suspect:
                overtakers = sum(self.arrival[request_id] > later for request_id in self.admission_order)
                assert overtakers == state.num_overtakes <= MAX_OVERTAKES

    def teardown(self) -> None:
        for request_id in list(self.inside):
            assert self.scheduler.cancel(request_id)
        self.withdraw()
        assert len(self.ends) == self.num_submitted
        assert set(self.ends.values()) <= {1}
        assert self.scheduler.num_live_rows == 0
        assert [len(self.scheduler._slots.take(4)), len(self.scheduler._rows.take(10))] == [4, 10]


TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = settings(max_examples=120, stateful_step_count=60)


class PlainScheduler(Scheduler):
    """Looks at every sentence at every step."""

    def withdraw(self) -> list[tuple[GenerationState, FinishReason]]:
        now = self._clock()
        leaving = []
        for state in (*self._waiting.values(), *self._running.values()):
            if state.is_cancelled:
                leaving.append((state, FinishReason.CANCELLED))
            elif state.deadline_s is not None and now >= state.deadline_s:
                leaving.append((state, FinishReason.DEADLINE))
        for state, _ in leaving:
            self._release(state, now)
        return leaving

    def admit(self) -> list[GenerationState]:
        if any(state.is_suspect for state in self._running.values()):
            return []
        return super().admit()

    def _is_worth_a_pass(self) -> bool:
        free_rows, free_slots = self._rows.num_free, self._slots.num_free
        num_rows = sum(state.request.search.beam_size for state in self._waiting.values())
        fits = num_rows <= free_rows and len(self._waiting) <= free_slots
        shares = (free_rows / self._config.max_rows, free_slots / self._config.max_source_slots)
        return not self._running or fits or min(shares) >= MIN_FREE_SHARE


@pytest.mark.parametrize("seed", range(12))
def test_decisions_are_those_of_a_scheduler_that_looks_at_everything(seed: int) -> None:
    generator = np.random.default_rng(seed)
    clock = Clock(50.0)
    config = EngineConfig(precision="fp32", max_rows=24, max_source_slots=9, max_waiting=40)
    quick, plain = (kind(config, clock=clock, epoch_clock=clock) for kind in (Scheduler, PlainScheduler))
    num_submitted, num_withdrawn, num_idle = 0, 0, 0
    for _ in range(400):
        for _ in range(int(generator.choice([0, 0, 1, 4]))):
            budget = float(generator.integers(1, 60)) if generator.random() < 0.3 else None
            beam, name = int(generator.choice([1, 1, 2, 5])), str(num_submitted)
            if quick.num_waiting < config.max_waiting:
                for scheduler in (quick, plain):
                    scheduler.submit(make_state(name, beam_size=beam, time_budget_s=budget))
                num_submitted += 1
        if generator.random() < 0.1 and num_submitted:
            name = str(int(generator.integers(max(0, num_submitted - 40), num_submitted)))
            assert quick.cancel(name) == plain.cancel(name)
        withdrawn = [[(s.request.request_id, reason) for s, reason in each.withdraw()] for each in (quick, plain)]
        assert withdrawn[0] == withdrawn[1]
        num_withdrawn += len(withdrawn[0])
        admitted = [[(s.request.request_id, s.source_slot, s.beam_rows) for s in each.admit()] for each in (quick, plain)]
        assert admitted[0] == admitted[1]
        num_idle += not admitted[0]
        if generator.random() < 0.02:
            for scheduler in (quick, plain):
                scheduler.put_back(scheduler.running())
        for state in quick.running():
            if generator.random() < 0.08:
                quick.finish(state.source_slot)
                plain.finish(state.source_slot)
        clock.now_s += 1.0
    assert num_withdrawn > 5
    assert 100 < num_idle < 400


def drain_order(scheduler: Scheduler) -> list[str]:
    """Admit and finish, oldest first, until nothing waits."""
    order: list[str] = []
    while scheduler.num_waiting:
        order += [state.request.request_id for state in scheduler.admit()]
        scheduler.finish(scheduler.running()[0].source_slot)
    return order


def test_first_come_first_served_when_everything_fits() -> None:
    scheduler = Scheduler(CONFIG)
    for i in range(6):
        scheduler.submit(make_state(str(i)))
    assert drain_order(scheduler) == list("012345")


def test_a_wide_sentence_is_overtaken_a_bounded_number_of_times() -> None:
    config = EngineConfig(precision="fp32", max_rows=8, max_source_slots=8, max_waiting=1000)
    scheduler = Scheduler(config)
    scheduler.submit(make_state("first"))
    scheduler.admit()
    scheduler.submit(make_state("wide", beam_size=8))
    for i in range(200):
        scheduler.submit(make_state(f"small{i}"))
    order = drain_order(scheduler)
    assert order.index("wide") == MAX_OVERTAKES
    assert [name for name in order if name != "wide"] == [f"small{i}" for i in range(200)]


def test_under_load_sentences_are_let_in_several_at_a_time() -> None:
    scheduler = Scheduler(EngineConfig(precision="fp32", max_rows=16, max_source_slots=16))
    for i in range(40):
        scheduler.submit(make_state(str(i)))
    assert len(scheduler.admit()) == 16
    admitted = []
    for state in scheduler.running()[:8]:
        scheduler.finish(state.source_slot)
        admitted.append(len(scheduler.admit()))
    assert admitted == [0, 0, 0, 4, 0, 0, 0, 4]


def test_what_fits_is_let_in_at_once_when_nothing_else_waits() -> None:
    scheduler = Scheduler(EngineConfig(precision="fp32", max_rows=16, max_source_slots=16))
    for i in range(17):
        scheduler.submit(make_state(str(i)))
    assert len(scheduler.admit()) == 16
    scheduler.finish(scheduler.running()[0].source_slot)
    assert [state.request.request_id for state in scheduler.admit()] == ["16"]


def test_suspects_come_first_in_halves_and_alone_with_their_kind() -> None:
    """Groups of 7, 3, 1, as the first sentence of each group is the one that breaks it."""
    scheduler = Scheduler(EngineConfig(precision="fp32", max_rows=16, max_source_slots=16))
    for i in range(7):
        scheduler.submit(make_state(str(i)))
    assert len(scheduler.admit()) == 7
    scheduler.submit(make_state("new"))
    scheduler.put_back(scheduler.running())
    groups = []
    while scheduler.num_waiting or scheduler.num_running:
        groups.append("".join(state.request.request_id for state in scheduler.admit()))
        assert scheduler.admit() == []
        running = scheduler.running()
        if running[0].request.request_id == "0" and len(running) > 1:
            scheduler.put_back(running)
            continue
        for state in running:
            scheduler.finish(state.source_slot)
    assert groups == ["012", "0", "1", "2", "345", "6", "new"]


def test_suspects_wait_for_those_that_run() -> None:
    scheduler = Scheduler(CONFIG)
    for name in ("running", "suspect"):
        scheduler.submit(make_state(name))
    running, suspect = scheduler.admit()
    scheduler.put_back([suspect])
    assert scheduler.admit() == []
    scheduler.finish(running.source_slot)
    assert scheduler.admit() == [suspect]


def test_suspects_share_encoder_passes_within_the_budget() -> None:
    scheduler = Scheduler(EngineConfig(precision="fp32", max_rows=8, max_source_tokens=12, encode_token_budget=16))
    for i in range(4):
        scheduler.submit(make_state(str(i), num_tokens=12 - i))
        scheduler.admit()
    assert scheduler.num_running == 4
    scheduler.put_back(scheduler.running())
    assert [len(scheduler.admit()) for _ in range(2)] == [1, 0]


def test_the_budget_starts_at_arrival_not_at_submission() -> None:
    clock, epoch = Clock(50.0), Clock(1_000_007.0)
    scheduler = Scheduler(CONFIG, clock=clock, epoch_clock=epoch)
    scheduler.submit(make_state("late", time_budget_s=10.0, arrived_at_s=1_000_000.0))
    scheduler.submit(make_state("from the future", time_budget_s=10.0, arrived_at_s=1_000_900.0))
    scheduler.submit(make_state("spent already", time_budget_s=10.0, arrived_at_s=999_000.0))
    assert [s.request.request_id for s, _ in scheduler.withdraw()] == ["spent already"]
    clock.now_s = 52.9
    assert scheduler.withdraw() == []
    clock.now_s = 53.0
    assert [(s.request.request_id, reason) for s, reason in scheduler.withdraw()] == [("late", FinishReason.DEADLINE)]
    clock.now_s = 60.0
    assert [s.request.request_id for s, _ in scheduler.withdraw()] == ["from the future"]


def test_timings_add_up_to_the_stay() -> None:
    clock = Clock(10.0)
    scheduler = Scheduler(CONFIG, clock=clock)
    state = make_state("a")
    scheduler.submit(state)
    clock.now_s = 12.0
    scheduler.mark_encoded(scheduler.admit())
    clock.now_s = 15.0
    scheduler.finish(state.source_slot)
    assert (state.timings.queue_s, state.timings.encode_s, state.timings.decode_s) == (2.0, 0.0, 3.0)
    waiting = make_state("b")
    scheduler.submit(waiting)
    scheduler.cancel("b")
    clock.now_s = 19.0
    scheduler.withdraw()
    assert (waiting.timings.queue_s, waiting.timings.encode_s, waiting.timings.decode_s) == (4.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        (make_state("a", beam_size=8), "invalid_option", "more than max_rows 7"),
        (make_state("b", num_tokens=13), "source_too_long", "at most 12 fit"),
        (make_state("taken"), "invalid_option", "'taken' is in use"),
    ],
)
def test_what_could_never_run_is_refused(state: GenerationState, code: str, message: str) -> None:
    config = EngineConfig(precision="fp32", max_rows=7, max_source_tokens=12, encode_token_budget=12)
    scheduler = Scheduler(config)
    scheduler.submit(make_state("taken"))
    with pytest.raises(RequestError, match=message) as caught:
        scheduler.submit(state)
    assert caught.value.code == code
    assert scheduler.request_ids() == ["taken"]


def test_a_running_request_id_is_in_use_until_it_ends() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.submit(make_state("a"))
    [state] = scheduler.admit()
    with pytest.raises(RequestError, match="in use"):
        scheduler.submit(make_state("a"))
    scheduler.finish(state.source_slot)
    scheduler.submit(make_state("a"))


def test_host_policy_loads_no_torch() -> None:
    modules = "engine.scheduler, engine.tokenizer, engine.batching, engine.slots, engine.types, engine.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
