"""Who takes part in a step on the device, against a plain bookkeeper; steps are read two late, as the runner does it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engine.search.device_search import DeviceSearch, StepShape
from engine.search.spec import SearchSpec
from engine.slots import FreeList
from engine.types import SearchOptions
from kernels.beam_search.tables import NUM_TOKENS
from kernels.history_lists import history_lists_reference

NUM_SLOTS, NUM_ROWS, MAX_TOKENS = 5, 14, 9
BUCKETS = (1, 2, 3, 4, 8, 16, 32)


@dataclass(eq=False)
class Sentence:
    """What the plain bookkeeper knows of one."""

    spec: SearchSpec
    num_tokens: int = 1
    is_new: bool = True


def make_search(lists_from: int | None = None) -> DeviceSearch:
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    return DeviceSearch(
        num_slots=NUM_SLOTS,
        num_rows=NUM_ROWS,
        max_target_tokens=MAX_TOKENS,
        start_token_id=2,
        eos_token_id=2,
        entry_buckets=BUCKETS,
        device=torch.device("cpu"),
        lists_from=lists_from,
    )


def draw_spec(generator: np.random.Generator, slots: FreeList, rows: FreeList) -> SearchSpec | None:
    beam = int(generator.choice([1, 2, 4, 5]))
    if not slots.num_free or rows.num_free < beam:
        return None
    options = SearchOptions(beam_size=beam, no_repeat_ngram_size=int(generator.choice([0, 0, 2, 3])))
    return SearchSpec(slots.take(1)[0], rows.take(beam), 5, int(generator.integers(2, MAX_TOKENS + 1)), options)


def expected_plan(fed: list[Sentence]) -> tuple[np.ndarray, StepShape]:
    """Entries and groups one by one: all beams of every sentence, of new ones the first, then the start tokens of those."""
    widths = [1 if s.is_new else len(s.spec.beam_rows) for s in fed]
    entries = [(s.spec.source_slot, beam) for s, width in zip(fed, widths, strict=True) for beam in range(width)]
    groups, start = [], 0
    for s, width in zip(fed, widths, strict=True):
        groups.append((s.spec.source_slot, start, width))
        start += width
    for s in fed:
        if s.is_new:
            groups.append((s.spec.source_slot, len(entries), 1))
            entries.append((s.spec.source_slot, -1))
    plan = np.zeros((5, BUCKETS[-1]), dtype=np.int32)
    plan[[0, 2]] = -1
    plan[:2, : len(entries)] = np.array(entries).T
    plan[2:, : len(groups)] = np.array(groups).T
    most = max(len(s.spec.beam_rows) for s in fed)
    candidates = 1 if most == 1 else 8 if most <= 4 else 16
    ngrams = tuple(sorted({s.spec.options.no_repeat_ngram_size for s in fed} - {0}))
    return plan, StepShape(min(b for b in BUCKETS if b >= len(entries)), candidates, ngrams)


@pytest.mark.parametrize("seed", range(6))
def test_compositions_are_those_of_a_plain_bookkeeper(seed: int) -> None:
    """Sentences come, end by themselves, reach their limit, are dropped, and are all forgotten once. What the host hears of
    them may be of later steps than it asks about."""
    generator = np.random.default_rng(seed)
    search, sentences = make_search(), []
    slots, rows = FreeList(NUM_SLOTS), FreeList(NUM_ROWS)
    in_flight: deque = deque()
    reported = search.tables.reported  # written here in place of the device
    num_ended = num_removed = num_same = 0

    def leave(gone: list[Sentence]) -> None:
        for sentence in gone:
            sentences.remove(sentence)
            slots.give_back((sentence.spec.source_slot,))
            rows.give_back(sentence.spec.beam_rows)

    for number in range(120):
        if sentences and generator.random() < 0.2:
            gone = [s for s in sentences if generator.random() < 0.5]
            search.remove({s.spec.source_slot for s in gone} | {NUM_SLOTS + 3})
            leave(gone)
            num_removed += len(gone)
        if number == 60:  # a fault
            search.clear()
            in_flight.clear()
            leave(list(sentences))
        specs = [draw_spec(generator, slots, rows) for _ in range(int(generator.choice([0, 0, 0, 1, 3])))]
        specs = [spec for spec in specs if spec is not None]
        search.add(specs)
        sentences += [Sentence(spec) for spec in specs]
        if len(in_flight) == 2 or (in_flight and all(s.num_tokens >= s.spec.max_tokens for s in sentences)):
            composition, members = in_flight.popleft()
            closed = search.close(composition)
            gone = [s for s in members if reported[s.spec.source_slot] and s in sentences]
            assert [s.spec for s in closed] == [s.spec for s in gone]
            leave(gone)
            num_ended += len(gone)
        fed = [s for s in sentences if s.num_tokens < s.spec.max_tokens]
        shape = search.plan()
        if not fed:
            assert shape is None
            continue
        plan, expected_shape = expected_plan(fed)
        assert shape == expected_shape
        assert np.array_equal(search._plan.numpy(), plan)
        composition = search.took()
        num_same += bool(in_flight) and in_flight[-1][0] is composition
        for s in fed:
            s.num_tokens, s.is_new = s.num_tokens + 1, False
            if s.num_tokens >= s.spec.max_tokens or generator.random() < 0.1:
                reported[s.spec.source_slot] = 1
        in_flight.append((composition, fed))
    assert num_ended > 10
    assert num_removed > 3
    assert num_same > 3, "steps of the same sentences must not upload again"


def test_steps_of_many_entries_list_their_histories() -> None:
    """Of a size from which that pays on; smaller steps, and a search that is told of no size, list nothing."""
    search = make_search(lists_from=8)
    sentences = ((0, 4, 5), (2, 1, 1))  # slot, beams, tokens
    taken = iter((7, 3, 12, 0, 9))
    for slot, beams, num_tokens in sentences:  # the second begins a step later
        rows = [next(taken) for _ in range(beams)]
        search.add([SearchSpec(slot, rows, 5, MAX_TOKENS, SearchOptions(beam_size=beams))])
        search.tables.sentences[slot, NUM_TOKENS] = num_tokens
        if slot == 0:
            assert search.plan() == StepShape(2, 8, ()), "its first beam and its start token"
            search.took()
    search.tables.ancestry[12, 3] = 7  # one of the beams has another parent there than its mates
    shape = search.plan()
    assert shape is not None and shape.num_entries == 8
    inputs, lists = search.feed(shape), search.history_lists(shape)
    assert lists is not None
    operands = *search.groups(shape), inputs.rows, inputs.positions, search.tables.ancestry
    twin = history_lists_reference(*operands, max_positions=MAX_TOKENS)
    assert lists.groups[:4, 2].tolist() == [1 + 4 * 5, 2, 1, 0]
    assert torch.equal(lists.groups, twin.groups)
    assert int(lists.in_use) == int(twin.in_use) == 3
    for mine, wanted, size in zip(lists.words, twin.words, twin.groups[:, 2].tolist(), strict=True):
        assert torch.equal(mine[:size], wanted[:size])
    assert search.history_lists(shape._replace(num_entries=4)) is None
    assert make_search().history_lists(shape) is None
    assert make_search(lists_from=100).history_lists(shape) is None


def test_usual_groups_are_those_of_sentences_with_all_their_beams() -> None:
    """Greedy: one an entry; eight candidates are for four beams, sixteen for eight."""
    search = make_search()
    shapes = [StepShape(*size, ()) for size in ((1, 1), (96, 1), (320, 8), (321, 8), (8, 16), (1, 8))]
    assert [search.usual_groups(shape) for shape in shapes] == [1, 96, 80, 81, 1, 1]


def test_many_new_sentences_get_programs_for_every_group() -> None:
    """80 sentences of 4 beams: two entries each at first, all groups of their own; from the second step on 80 groups."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    search = DeviceSearch(
        num_slots=80,
        num_rows=320,
        max_target_tokens=MAX_TOKENS,
        start_token_id=2,
        eos_token_id=2,
        entry_buckets=(160, 320, 400),
        device=torch.device("cpu"),
    )
    options = SearchOptions(beam_size=4)
    search.add([SearchSpec(s, tuple(range(4 * s, 4 * s + 4)), 5, MAX_TOKENS, options) for s in range(80)])
    shapes = []
    for _ in range(2):
        shape = search.plan()
        assert shape is not None
        shapes.append((shape, search.usual_groups(shape)))
        search.took()
    assert shapes == [(StepShape(160, 8, (), True), 160), (StepShape(320, 8, ()), 80)]
