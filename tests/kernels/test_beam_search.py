"""Search kernels against a plain Python search over lists: mixed beam sizes, stops, limits, idle and broken entries."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.beam_search import BeamTables, StepInputs, advance_sentences, begin_sentences, step_inputs
from kernels.beam_search.reference import Hypothesis, SentenceState, advance_sentence_reference
from kernels.beam_search.tables import BOUNDS_BY_MAX, FIRST_TOKEN, STOPS_WHEN_FULL

START, EOS, VOCAB = 2, 2, 40


class Fleet:
    """Sentences in the tables and as lists, side by side."""

    def __init__(self, device: torch.device, specs: list[dict[str, int]], max_target_tokens: int) -> None:
        self.device, self.specs = device, specs
        num_slots = len(specs) + 2
        num_rows = sum(s["beams"] for s in specs) + 3
        self.tables = BeamTables.allocate(
            num_slots=num_slots, num_rows=num_rows, max_target_tokens=max_target_tokens, device=device
        )
        for tensor in (self.tables.cum_logprob, self.tables.hypothesis_score, self.tables.normalizers):
            tensor.fill_(float("nan"))
        for tensor in (self.tables.ancestry, self.tables.history, self.tables.hypotheses, self.tables.results):
            tensor.fill_(-7)
        self.tables.status.fill_(1)
        self.tables.reported.fill_(1)
        order = list(range(num_slots))
        random.Random(1).shuffle(order)
        free_rows = list(range(num_rows))
        random.Random(2).shuffle(free_rows)
        records, norms = [], []
        self.slots, self.rows, self.states = [], [], []
        for spec in specs:
            slot, rows = order.pop(), [free_rows.pop() for _ in range(spec["beams"])]
            records.append(
                [slot, spec["beams"], spec["max"], spec["min"], spec["flags"], spec["forced"], 0, 0, *rows]
                + [0] * (8 - spec["beams"])
            )
            norms.append([max(n, 1) ** (spec["penalty"] / 10) for n in range(max_target_tokens + 2)])
            self.slots.append(slot)
            self.rows.append(rows)
            self.states.append(
                SentenceState(
                    num_beams=spec["beams"],
                    max_tokens=spec["max"],
                    stops_when_full=bool(spec["flags"] & STOPS_WHEN_FULL),
                    bounds_by_max=bool(spec["flags"] & BOUNDS_BY_MAX),
                    normalizers=norms[-1],
                    prefixes=[[START, spec["forced"]] for _ in rows],
                    cum_logprob=[0.0] + [-1e9] * (spec["beams"] - 1),
                    finished=[Hypothesis() for _ in rows],
                )
            )
        self.records = torch.tensor(records, dtype=torch.int32, device=device)
        self.norms = torch.tensor(norms, device=device)
        self.begin()
        entries = [(s, j) for s, spec in enumerate(specs) for j in range(spec["beams"])]
        idle = [(-1, 0)] * 2

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.entry_slots = ints([self.slots[s] for s, _ in entries] + [-1, self.slots[0], -1])
        self.entry_beams = ints([j for _, j in entries] + [0, -1, 0])
        starts = [sum(x["beams"] for x in specs[:s]) for s in range(len(specs))]
        self.group_slots = ints([*self.slots, self.slots[0], -1])
        self.group_starts = ints([*starts, len(entries) + 1, 0])
        self.group_counts = ints([x["beams"] for x in specs] + [1, 0])
        self.num_entries, self.first_entry = len(entries) + len(idle) + 1, starts

    def inputs(self) -> StepInputs:
        out = StepInputs.allocate(self.num_entries, self.device)
        return step_inputs(self.entry_slots, self.entry_beams, self.tables, start_token_id=START, eos_token_id=EOS, out=out)

    def begin(self) -> None:
        begin_sentences(self.records, self.norms, self.tables, start_token_id=START)

    def advance(self, values: torch.Tensor, ids: torch.Tensor, *, only_first_beams: bool = False) -> None:
        self.launch(values, ids, only_first_beams=only_first_beams)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # results are read from the host's memory

    def launch(self, values: torch.Tensor, ids: torch.Tensor, *, only_first_beams: bool = False) -> None:
        advance_sentences(
            values,
            ids,
            self.group_slots,
            self.group_starts,
            self.group_counts.clamp(max=1) if only_first_beams else self.group_counts,
            self.entry_beams,
            self.tables,
            eos_token_id=EOS,
        )

    def prefix(self, s: int, beam: int, length: int) -> list[int]:
        """Read a beam's tokens back by ancestry, from the start token."""
        ancestry, history = self.tables.ancestry.cpu(), self.tables.history.cpu()
        row = self.rows[s][beam]
        return [int(history[int(ancestry[row, t]), t, 0]) for t in range(length)]

    def result(self, s: int, place: int) -> tuple[float, tuple[int, ...]]:
        """Score and tokens of a hypothesis of a closed sentence."""
        found = self.tables.results[place, self.slots[s]]
        length = int(found[0])
        return float(found[1].view(torch.float32)), tuple(found[FIRST_TOKEN : FIRST_TOKEN + length].tolist())


def spec(beams: int, **changes: int) -> dict[str, int]:
    return {"beams": beams, "max": 9, "min": 0, "flags": 0, "forced": 5, "penalty": 10} | changes


SPECS = [
    spec(1),
    spec(4, forced=6),
    spec(2, flags=STOPS_WHEN_FULL),
    spec(8, flags=BOUNDS_BY_MAX, penalty=15),
    spec(3, max=2),
    spec(5, penalty=-10, max=11),
    spec(7, min=6),
    spec(4, penalty=0, flags=STOPS_WHEN_FULL),
]


# Candidates a row: what the largest beam needs, one where all are greedy.
WIDTHS = {1: [spec(1), spec(1, max=2), spec(1, min=6)], 4: [s for s in SPECS if s["beams"] <= 2], 8: SPECS[:3], 16: SPECS}


@pytest.mark.parametrize("width", WIDTHS)
def test_search_matches_lists(cpu: torch.device, width: int) -> None:
    check_search(cpu, width, seed=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_first_step_needs_first_beams_only(cpu: torch.device, width: int) -> None:
    check_search(cpu, width, seed=0, first_alone=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", WIDTHS)
def test_search_matches_lists_on_gpu(cuda: torch.device, width: int, seed: int) -> None:
    check_search(cuda, width, seed, first_alone=seed % 2 == 1)


def check_search(device: torch.device, width: int, seed: int, *, first_alone: bool = False) -> None:
    """first_alone: in the first step groups have one entry, and candidates of the other beams are NaN."""
    fleet = Fleet(device, WIDTHS[width], max_target_tokens=12)
    generator = torch.Generator().manual_seed(seed)
    for step in range(12):
        alone = first_alone and step == 0
        inputs = fleet.inputs()
        check_inputs(fleet, inputs)
        values = torch.full((fleet.num_entries, width), float("nan"))
        ids = torch.full((fleet.num_entries, width), -1, dtype=torch.int32)
        for s, state in enumerate(fleet.states):
            for j in range(state.num_beams):
                logits = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
                logits[EOS] += 2.0
                logprob = logits.log_softmax(0)
                entry = fleet.first_entry[s] + j
                if int(inputs.banned[entry]) >= 0:
                    logprob[int(inputs.banned[entry])] = float("-inf")
                top = logprob.float().topk(width)
                values[entry], ids[entry] = top.values, top.indices.int()
        given = values.clone()
        for s, state in enumerate(fleet.states if alone else ()):
            given[fleet.first_entry[s] + 1 : fleet.first_entry[s] + state.num_beams] = float("nan")
        fleet.advance(given.to(device), ids.to(device), only_first_beams=alone)
        for s, state in enumerate(fleet.states):
            if state.closed:
                continue
            rows = slice(fleet.first_entry[s], fleet.first_entry[s] + state.num_beams)
            keep = 1 if state.num_beams == 1 else width
            advance_sentence_reference(state, values[rows, :keep].tolist(), ids[rows, :keep].tolist(), EOS)
            check_sentence(fleet, s)
    assert all(state.closed for state in fleet.states)
    for s in range(len(fleet.states)):  # later steps, of others, leave results alone
        check_results(fleet, s)
    assert fleet.tables.results[:, sorted(set(range(len(fleet.slots) + 2)) - set(fleet.slots))].eq(-7).all()


def check_inputs(fleet: Fleet, inputs: StepInputs) -> None:
    for s, state in enumerate(fleet.states):
        for j in range(state.num_beams):
            entry = fleet.first_entry[s] + j
            assert bool(inputs.active[entry]) == (not state.closed)
            if state.closed:
                assert int(inputs.rows[entry]) == -1
                continue
            position = len(state.prefixes[j]) - 1
            assert int(inputs.token_ids[entry]) == state.prefixes[j][-1]
            assert int(inputs.positions[entry]) == position
            assert int(inputs.rows[entry]) == fleet.rows[s][j]
            assert int(inputs.banned[entry]) == (EOS if position < fleet.specs[s]["min"] else -1)
    idle, start = fleet.num_entries - 1, fleet.num_entries - 2
    assert int(inputs.rows[idle]) == -1 and not inputs.active[idle]
    if not fleet.states[0].closed:
        assert int(inputs.positions[start]) == 0 and int(inputs.token_ids[start]) == START
        assert int(inputs.rows[start]) == fleet.rows[0][0]


def check_sentence(fleet: Fleet, s: int) -> None:
    state, slot, tables = fleet.states[s], fleet.slots[s], fleet.tables
    assert int(tables.status[slot]) == int(tables.reported[slot]) == int(state.closed)
    n = state.num_beams
    torch.testing.assert_close(tables.cum_logprob[slot, :n].cpu(), torch.tensor(state.cum_logprob), rtol=1e-6, atol=1e-5)
    for j, prefix in enumerate(state.prefixes):
        if n > 1 or not state.closed:
            assert fleet.prefix(s, j, len(prefix)) == prefix
    for place, hypothesis in enumerate(state.finished):
        assert bool(tables.hypotheses[slot, place, 0]) == hypothesis.done
        if hypothesis.done:
            score = float(tables.hypothesis_score[slot, place])
            assert score == pytest.approx(hypothesis.score, rel=1e-5)
            assert tables.hypotheses[slot, place, 2:].tolist() == [hypothesis.last_token, hypothesis.length]
    if state.closed:
        check_results(fleet, s)


def check_results(fleet: Fleet, s: int) -> None:
    state, slot = fleet.states[s], fleet.slots[s]
    for place, hypothesis in enumerate(state.finished):
        score, tokens = fleet.result(s, place)
        assert tokens == (hypothesis.tokens if hypothesis.done else ())
        assert score == float(fleet.tables.hypothesis_score[slot, place])
    assert fleet.tables.results[state.num_beams :, slot, FIRST_TOKEN:].eq(-7).all(), "places that the sentence has not"


def test_broken_logits_stop_their_sentence_only(cpu: torch.device) -> None:
    fleet = Fleet(cpu, [spec(2), spec(2)], max_target_tokens=12)
    values = torch.log_softmax(torch.randn(fleet.num_entries, 16), 1).sort(descending=True).values
    ids = torch.arange(3, 19, dtype=torch.int32).repeat(fleet.num_entries, 1)
    values[1] = float("nan")
    fleet.advance(values, ids)
    for status in (fleet.tables.status, fleet.tables.reported):
        assert [int(status[slot]) for slot in fleet.slots] == [2, 0]


@pytest.mark.parametrize("beams", [1, 2])
def test_nothing_may_be_chosen_at_the_limit(cpu: torch.device, beams: int) -> None:
    """The sentence closes without a hypothesis."""
    fleet = Fleet(cpu, [spec(beams, max=2)], max_target_tokens=12)
    values = torch.full((fleet.num_entries, 4), float("-inf"))
    fleet.advance(values, torch.full((fleet.num_entries, 4), 9, dtype=torch.int32))
    state = fleet.states[0]
    advance_sentence_reference(state, values[:beams].tolist(), [[9] * 4] * beams, EOS)
    assert state.closed and not any(hypothesis.done for hypothesis in state.finished)
    check_sentence(fleet, 0)


def test_equal_candidates_take_the_first(cpu: torch.device) -> None:
    fleet = Fleet(cpu, [spec(2)], max_target_tokens=12)
    values = torch.full((fleet.num_entries, 4), -1.0)
    ids = torch.tensor([[9, 8, 7, 6]], dtype=torch.int32).repeat(fleet.num_entries, 1)
    fleet.advance(values, ids)
    assert fleet.tables.token_ids[fleet.slots[0], :2].tolist() == [9, 8]


def test_wrong_shapes_say_the_fix(cpu: torch.device) -> None:
    tables = BeamTables.allocate(num_slots=2, num_rows=4, max_target_tokens=8, device=cpu)
    with pytest.raises(ValueError, match="give \\[B, 16\\]"):
        begin_sentences(torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 10), tables, start_token_id=START)
    with pytest.raises(ValueError, match="normalizers"):
        begin_sentences(torch.zeros(1, 16, dtype=torch.int32), torch.zeros(1, 9), tables, start_token_id=START)


@pytest.mark.gpu
def test_results_are_there_as_soon_as_the_host_is_told(cuda: torch.device) -> None:
    """The host reads while search steps run, many times over: a sentence that is reported has all its tokens."""
    count, length = 256, 24
    specs = [spec(4, max=length, forced=5 + s % 30) for s in range(count)]
    fleet = Fleet(cuda, specs, max_target_tokens=length)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(length):  # no entry chooses eos, so all sentences close in the last step
        values = torch.randn(fleet.num_entries, 8, generator=generator).log_softmax(1).sort(descending=True).values
        steps.append(
            (values.to(cuda), torch.randint(3, VOCAB, values.shape, generator=generator, dtype=torch.int32).to(cuda))
        )
    reported, results = fleet.tables.reported.numpy(), fleet.tables.results.numpy()
    slots = fleet.slots
    for _ in range(20):
        results.fill(-7)
        fleet.begin()
        torch.cuda.synchronize()
        for values, ids in steps:
            fleet.launch(values, ids)
        seen = 0
        while seen < count:
            told = [slot for slot in slots if reported[slot]]
            lengths = results[0, told, 0]
            tokens = results[0, told, FIRST_TOKEN : FIRST_TOKEN + length]
            assert (lengths == length).all() and (tokens != -7).all()
            seen = len(told)
        torch.cuda.synchronize()
