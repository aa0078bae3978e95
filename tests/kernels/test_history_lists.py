"""Lists of the cells of histories: made by the launch that feeds a step, against a list made cell by cell and against what
each entry has to see; then attention through them, in captured steps of several sizes."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.beam_search import BeamTables, StepInputs, step_inputs
from kernels.checks import LIMITS
from kernels.decode_attention import decode_self_attention, decode_self_attention_reference, lists_from
from kernels.decode_attention.tiles import GroupTiles
from kernels.embed import embed
from kernels.history_lists import PLACES, SEEN_BY, HistoryLists, history_lists_reference
from kernels.self_attention_checks import GroupCase, group_inputs
from kernels.small_linear import qkv_linear
from kernels.testing import relative_error

START, EOS = 2, 3
CELL = (1 << SEEN_BY) - 1


def ints(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Sentence:
    beams: int
    position: int
    is_live: bool = True
    is_new: bool = False  # at position 1, and its start token is fed too, as an entry of its own behind all beams


class Step:
    """Tables that hold these sentences, and what the host hands over: entries, then idle ones; groups, then unused ones."""

    def __init__(
        self, sentences: list[Sentence], max_positions: int, num_entries: int, device: torch.device, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        num_slots, num_rows = len(sentences) + 2, sum(s.beams for s in sentences) + 3
        tables = BeamTables.allocate(
            num_slots=num_slots, num_rows=num_rows, max_target_tokens=max_positions, device=torch.device("cpu")
        )
        tables.ancestry.random_(0, num_rows)  # also where no position is yet: it must not matter
        tables.token_ids.random_(0, 50)
        tables.rows.fill_(-7)
        free, slots = rng.permutation(num_rows).tolist(), rng.permutation(num_slots).tolist()
        for slot, sentence in zip(slots, sentences, strict=False):
            rows = [free.pop() for _ in range(sentence.beams)]
            tables.rows[slot, : sentence.beams] = ints(rows)
            tables.sentences[slot, [0, 2, 4]] = ints([sentence.beams, int(rng.integers(0, 20)), sentence.position])
            tables.status[slot] = 0 if sentence.is_live else int(rng.integers(1, 3))
            common = int(rng.integers(0, sentence.position + 1))  # beams have split up at one of the positions, or at none
            held = rng.choice(rows, (sentence.beams, max_positions + 1))
            held[:, :common] = held[:1, :common]
            held[:, 0] = rows[0]
            tables.ancestry[rows] = ints(held)
        self.members = [(s, slot, False) for s, slot in zip(sentences, slots, strict=False)]
        self.members += [(s, slot, True) for s, slot in zip(sentences, slots, strict=False) if s.is_new]
        plan, at = torch.zeros(5, num_entries, dtype=torch.int32), 0
        plan[[0, 2]] = -1
        for group, (sentence, slot, is_start) in enumerate(self.members):
            count = 1 if is_start else sentence.beams
            plan[0, at : at + count] = slot
            plan[1, at : at + count] = -1 if is_start else torch.arange(count)
            plan[2:, group] = ints([slot, at, count])
            at += count
        fields = {name: getattr(tables, name).to(device) for name in BeamTables.__slots__}
        self.tables, self.plan = BeamTables(**fields), plan.to(device)
        self.max_positions, self.num_used, self.device = max_positions, at, device

    @property
    def num_entries(self) -> int:
        return self.plan.shape[1]

    @property
    def groups(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.plan[2], self.plan[3], self.plan[4]

    def poisoned_lists(self) -> HistoryLists:
        size = {"num_rows": self.tables.ancestry.shape[0], "max_positions": self.max_positions}
        lists = HistoryLists.allocate(self.num_entries, **size, device=self.device)
        for tensor in (lists.groups, lists.words, lists.in_use):
            tensor.fill_((1 << 30) + 5)
        return lists

    def feed(self, lists: HistoryLists | None, out: StepInputs | None = None) -> StepInputs:
        return step_inputs(
            self.plan[0],
            self.plan[1],
            self.tables,
            start_token_id=START,
            eos_token_id=EOS,
            out=out or StepInputs.allocate(self.num_entries, self.device),
            groups=None if lists is None else self.groups,
            lists=lists,
        )

    def twin(self, inputs: StepInputs) -> HistoryLists:
        ancestry = self.tables.ancestry
        operands = *self.groups, inputs.rows, inputs.positions, ancestry
        return history_lists_reference(*operands, max_positions=self.max_positions)


def check_lists(step: Step) -> None:
    lists = step.poisoned_lists()
    plain, inputs = step.feed(None), step.feed(lists)
    for name in StepInputs.__slots__:
        assert torch.equal(getattr(plain, name), getattr(inputs, name)), name
    twin = step.twin(inputs)
    assert torch.equal(lists.groups, twin.groups)
    assert torch.equal(lists.in_use, twin.in_use)
    assert int(lists.in_use) == len(step.members)
    rows, words = inputs.rows.tolist(), lists.words.tolist()
    for group, (start, count, size, known) in enumerate(lists.groups.tolist()):
        listed = words[group][: max(1, -(-size // PLACES) * PLACES)]
        assert listed == twin.words[group, : len(listed)].tolist()
        assert set(words[group][len(listed) :]) == {(1 << 30) + 5}, "written behind the end of its list"
        if size:
            sentence, _, is_start = step.members[group]
            assert sentence.is_live
            check_group(step, rows[start : start + count], 0 if is_start else sentence.position, listed, size, known)
        else:
            assert group >= len(step.members) or not step.members[group][0].is_live


def check_group(step: Step, rows: list[int], last: int, words: list[int], size: int, known: int) -> None:
    """Each entry sees every cell of its own history once; what may be read early is not written by this step."""
    width, ancestry, group_cells = step.max_positions, step.tables.ancestry.tolist(), set[int]()
    for entry, row in enumerate(rows):
        history = [ancestry[row][t] * width + t for t in range(last)] + [row * width + last]
        seen = [word & CELL for word in words if word >> (SEEN_BY + entry) & 1]
        assert sorted(seen) == sorted(history)
        group_cells |= set(history)
    assert all(word & CELL in group_cells for word in words), "a place of no entry names a cell of another group"
    assert not any(word >> SEEN_BY & 0xFF for word in words[size:])
    assert not any(word >> (SEEN_BY + entry) & 1 for word in words for entry in range(len(rows), 8))
    written = {row * width + last for row in rows}
    assert not any(word & CELL in written for word in words[:known])
    assert (known == 0) == (last < 2)


def random_step(device: torch.device, seed: int, most: int = 24, max_positions: int = 40) -> Step:
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(int(rng.integers(1, most))):
        is_new = rng.random() < 0.15
        position = 1 if is_new else int(rng.integers(1, max_positions))
        sentences.append(Sentence(int(rng.integers(1, 9)), position, rng.random() < 0.8, is_new))
    num_entries = sum(s.beams + s.is_new for s in sentences) + int(rng.integers(0, 30))
    return Step(sentences, max_positions, num_entries, device, seed)


BORDERS = (1, 2, 3, 8, 31, 63, 64, 65, 128, 199)  # also of the span of positions that a program looks at at once


@pytest.mark.parametrize("beams", range(1, 9))
def test_lists_in_the_interpreter_hold_every_history(beams: int, cpu: torch.device) -> None:
    for position in BORDERS:
        sentences = [Sentence(beams, position), Sentence(beams, position, False), Sentence(beams, 1, is_new=True)]
        check_lists(Step(sentences, 200, 3 * beams + 3, cpu, seed=position))


def test_lists_of_mixed_steps_in_the_interpreter(cpu: torch.device) -> None:
    for seed in range(6):
        check_lists(random_step(cpu, seed))
    check_lists(Step([], 40, 5, cpu))
    check_lists(Step([Sentence(1, 1)], 3, 1, cpu))


@pytest.mark.gpu
def test_lists_on_the_gpu_hold_every_history(cuda: torch.device) -> None:
    for beams in range(1, 9):
        sentences = [Sentence(beams, position) for position in BORDERS]
        check_lists(Step(sentences, 200, 10 * beams + 7, cuda, seed=beams))
    for seed in range(4):
        check_lists(random_step(cuda, seed, most=150))
    check_lists(Step([], 40, 5, cuda))


def hopper(cuda: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    if lists_from(16, 64, dtype, cuda) is None:
        pytest.skip("the kernel that takes lists is for Hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_through_lists_matches_reference(head_dim: int, dtype: torch.dtype, cuda: torch.device) -> None:
    """One to eight beams, from one position to several hundred, shared up to nowhere, somewhere and everywhere; one and
    several groups a program; NaN in every cell that is of no history, and in those that words behind a list's end name."""
    hopper(cuda, dtype)
    short = (0, 1, 2, 7, 15, 16, 17, 31, 33, 48)
    points = [(beams, t, shared) for beams in range(1, 9) for t in short for shared in {0, t // 2, t}]
    points += [(-3, 9, 0), (0, 0, 0)] * 5
    long = [(8, 333, 100), (5, 256, 0), (3, 201, 201), (1, 300, 0), (2, 255, 3), (4, 219, 0)]
    for chosen in (points, long):
        case = GroupCase(4, head_dim, *zip(*chosen, strict=True))  # type: ignore[arg-type]
        inputs = group_inputs(case, cuda, dtype).listed()
        whole, truth = inputs.run(), inputs.truth()
        assert torch.equal(whole.isnan(), truth.isnan())
        inside = ~truth.isnan().all(1)
        assert relative_error(whole[inside], truth[inside]) <= LIMITS[dtype]
        for usual in (1, 7, 100, len(chosen)):  # only for more than 128 groups programs become fewer
            for ready in (False, True):
                again = dataclasses.replace(inputs, usual_groups=usual, ready=ready).run()
                torch.testing.assert_close(again, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_captured_steps_of_several_sizes_share_their_lists(cuda: torch.device) -> None:
    """Steps as the engine captures them: inputs with lists, embedding, first map, attention, which reads lists and cells
    while the map may still run. Sentences and sizes change between replays; what no history holds yet is NaN."""
    hopper(cuda)
    heads, d, max_positions, largest, rows = 16, 1024, 40, 320, 700
    generator = torch.Generator(cuda).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=cuda, generator=generator).bfloat16()

    table, places, weight = draw(64, d), draw(64, d), draw(3 * d, d) / 32
    cells = draw(rows, max_positions, 2, heads, 64)
    lists = HistoryLists.allocate(largest, num_rows=rows, max_positions=max_positions, device=cuda)
    tables = BeamTables.allocate(num_slots=160, num_rows=rows, max_target_tokens=max_positions, device=cuda)
    plan, whole = torch.zeros(5, largest, dtype=torch.int32, device=cuda), StepInputs.allocate(largest, cuda)

    def captured(size: int) -> tuple[torch.cuda.CUDAGraph, StepInputs, torch.Tensor, torch.Tensor]:
        inputs = StepInputs(**{name: getattr(whole, name)[:size] for name in StepInputs.__slots__})
        groups, mine = (plan[2, :size], plan[3, :size], plan[4, :size]), lists.first(size)
        feed = {"start_token_id": START, "eos_token_id": EOS, "out": inputs, "groups": groups, "lists": mine}
        out = torch.empty((size, d), device=cuda, dtype=torch.bfloat16)  # not of the graph's pool: others would use it too
        attend = {"num_heads": heads, "history_ready": True, "lists": mine, "usual_groups": -(-size // 4), "out": out}

        def step() -> torch.Tensor:
            step_inputs(plan[0, :size], plan[1, :size], tables, **feed)
            x = embed(inputs.token_ids, inputs.positions, table, places, scale=1.0, pad_token_id=1)
            q = qkv_linear(x, weight, None, cells, inputs.rows, inputs.positions)
            decode_self_attention(q, cells, tables.ancestry, inputs.rows, inputs.positions, **attend)
            return q

        plan.zero_()
        plan[[0, 2]] = -1
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            q = step()
        return graph, inputs, q, out

    sizes = {size: captured(size) for size in (320, 128, 16)}
    for seed, (size, sentences) in enumerate(
        (
            (320, [Sentence(4, 30)] * 80),
            (128, [Sentence(8, 12), Sentence(1, 5, False), Sentence(3, 1)] * 8),
            (16, [Sentence(2, 39), Sentence(5, 1), Sentence(5, 1, is_new=True)]),
            (320, [Sentence(4, 1, is_new=True)] * 60),
            (320, [Sentence(1 + i % 8, 1 + i * 7 % 39, i % 5 > 0) for i in range(70)]),
            (128, [Sentence(1, 20 + i % 20) for i in range(128)]),
            (320, []),
            (16, [Sentence(8, 33)] * 2),
        )
    ):
        made = Step(sentences, max_positions, size, cuda, seed)
        for name in ("sentences", "status", "rows", "token_ids", "ancestry"):  # what `step_inputs` reads
            source = getattr(made.tables, name)
            getattr(tables, name)[: len(source)] = source
        plan.fill_(-1)
        plan[:, :size] = made.plan
        graph, inputs, q, out = sizes[size]
        row, position = made.feed(None).rows.tolist(), made.feed(None).positions.tolist()
        ancestry, known = tables.ancestry.tolist(), torch.zeros(rows, max_positions, dtype=torch.bool)
        live = [entry for entry in range(made.num_used) if row[entry] >= 0]
        for entry in live:
            for t in range(position[entry]):
                known[ancestry[row[entry]][t], t] = True
        for entry in live:  # written by this very step
            known[row[entry], position[entry]] = False
        cells.copy_(draw(*cells.shape).masked_fill(~known.to(cuda)[:, :, None, None, None], math.nan))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        operands = q, cells, tables.ancestry, inputs.rows, inputs.positions
        truth = decode_self_attention_reference(*operands, num_heads=heads)
        used = slice(0, made.num_used)
        if made.num_used:
            assert relative_error(out[used], truth[used]) <= LIMITS[torch.bfloat16], (seed, size)
        assert out[made.num_used :].isnan().all()


def test_bad_lists_are_refused(cpu: torch.device) -> None:
    with pytest.raises(ValueError, match="more cells than 24 bits number"):
        HistoryLists.allocate(8, num_rows=1 << 14, max_positions=1 << 10, device=cpu)
    step = Step([Sentence(2, 3)], 5, 4, cpu)
    lists = step.poisoned_lists()
    with pytest.raises(ValueError, match="lists are of 3 groups; give 4"):
        step.feed(lists.first(3))
    with pytest.raises(ValueError, match="lists are of 4 positions; tables of 6"):
        step.feed(HistoryLists.allocate(4, num_rows=5, max_positions=3, device=cpu))
    with pytest.raises(ValueError, match="give both or neither"):
        step_inputs(
            step.plan[0],
            step.plan[1],
            step.tables,
            start_token_id=START,
            eos_token_id=EOS,
            out=StepInputs.allocate(4, cpu),
            groups=step.groups,
        )
    q, cells = torch.zeros(4, 64), torch.zeros(5, 5, 2, 1, 64)
    rows, positions = torch.zeros(2, 4, dtype=torch.int32)
    operands = q, cells, step.tables.ancestry, rows, positions
    with pytest.raises(ValueError, match="lists are for 16 bits on Hopper"):
        decode_self_attention(*operands, num_heads=1, lists=lists)
    with pytest.raises(ValueError, match="GroupTiles are for lists"):
        decode_self_attention(*operands, num_heads=1, tiles=GroupTiles(1, 16))
    with pytest.raises(ValueError, match="cells of 5 positions a row; these have 4"):
        decode_self_attention(q, cells[:, :4].contiguous(), *operands[2:], num_heads=1, lists=lists)


def test_a_list_is_as_long_as_what_is_read_before_its_size_is_known(cpu: torch.device) -> None:
    for max_positions in (1, 2, 3, 40, 41):
        lists = HistoryLists.allocate(3, num_rows=4, max_positions=max_positions, device=cpu)
        assert lists.words.shape[1] % PLACES == 0
        assert lists.words.shape[1] >= max(3 * PLACES, 8 * max_positions)
        assert lists.num_bytes == 4 * (3 * (lists.words.shape[1] + 4) + 1)


def test_the_launch_that_lists_waits_before_all_else() -> None:
    """And only then lets the next one start: attention reads lists as soon as the launch behind that one has begun. In a
    process of its own: here triton.jit means the interpreter."""
    code = r"""
import re
from kernels.beam_search.jobs import search_jobs
from kernels.compile_ahead import compile_kernel
jobs = [job for job in search_jobs() if job[1] == "step_inputs_kernel"]
assert [job[3]["LISTS"] for job in jobs] == [False, True]
for job in jobs:
    before, wait, after = re.sub(r"//.*", "", compile_kernel(job, 90).asm["ptx"]).partition("griddepcontrol.wait")
    assert wait and not re.search(r"\b(ld|st)\.global|launch_dependents", before)
    assert "launch_dependents" in after.split("global")[0]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
