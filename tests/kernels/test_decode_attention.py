import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kernels.attention_checks import attention_failures, check_inputs, every_kernel
from kernels.checks import LIMITS
from kernels.cross_attention_checks import CrossCase, cross_cases, cross_inputs
from kernels.decode_attention import (
    decode_cross_attention,
    decode_cross_attention_reference,
    decode_self_attention,
    decode_self_attention_reference,
)
from kernels.decode_attention.tiles import GroupTiles, group_constants, group_programs
from kernels.encoder_attention_checks import encoder_cases
from kernels.self_attention_checks import (
    GroupCase,
    SelfCase,
    SelfInputs,
    group_cases,
    group_inputs,
    self_cases,
    self_inputs,
)

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", self_cases(large=False), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_self_in_the_interpreter_matches_reference(case: SelfCase, dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_inputs(self_inputs(case, cpu, dtype)) <= LIMITS[dtype]


@pytest.mark.parametrize("case", cross_cases(large=False), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cross_in_the_interpreter_matches_reference(case: CrossCase, dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_inputs(cross_inputs(case, cpu, dtype)) <= LIMITS[dtype]


@pytest.mark.parametrize("case", group_cases(large=False), ids=lambda c: c.name)
def test_groups_in_the_interpreter_match_reference(case: GroupCase, cpu: torch.device) -> None:
    assert check_inputs(group_inputs(case, cpu, torch.float32)) <= LIMITS[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("case", group_cases(large=True), ids=lambda c: c.name[:60])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_groups_on_the_gpu_match_reference(case: GroupCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_inputs(group_inputs(case, cuda, dtype)) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("case", self_cases(large=True), ids=lambda c: c.name[:60])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_self_on_the_gpu_matches_reference(case: SelfCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_inputs(self_inputs(case, cuda, dtype)) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("case", cross_cases(large=True), ids=lambda c: c.name[:60])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_cross_on_the_gpu_matches_reference(case: CrossCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_inputs(cross_inputs(case, cuda, dtype)) <= LIMITS[dtype]


def test_self_reference_is_torch_attention() -> None:
    # Two beams that shared a parent until position 2: every key and value is gathered by hand here.
    q, cells = torch.randn(2, 32), torch.randn(3, 5, 2, 2, 16)
    ancestry = torch.tensor([[2, 2, 0, 0, 9], [9, 9, 9, 9, 9], [2, 2, 0, 2, 9]], dtype=torch.int32)
    rows, positions = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    first = torch.stack((cells[2, 0], cells[2, 1], cells[0, 2], cells[0, 3]))
    second = torch.stack((cells[2, 0], cells[2, 1], cells[0, 2], cells[2, 3], cells[2, 4]))
    out = decode_self_attention_reference(q, cells, ancestry, rows, positions, num_heads=2)
    for entry, history in enumerate((first, second)):
        key, value = history.permute(1, 2, 0, 3).unbind(0)
        wanted = functional.scaled_dot_product_attention(q[entry].view(2, 1, 16), key, value)
        torch.testing.assert_close(out[entry], wanted.flatten())


def test_cross_reference_is_torch_attention() -> None:
    q, cells = torch.randn(5, 32), torch.randn(2, 6, 2, 2, 16)
    slots, starts, counts, lengths = (torch.tensor(v, dtype=torch.int32) for v in ([1, 0], [0, 3], [3, 2], [6, 4]))
    out = decode_cross_attention_reference(q, cells, lengths, slots, starts, counts, num_heads=2)
    for slot, entries, length in ((1, slice(0, 3), 4), (0, slice(3, 5), 6)):
        key, value = cells[slot, :length].permute(1, 2, 0, 3).unbind(0)
        query = q[entries].view(-1, 2, 16).transpose(0, 1)
        wanted = functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out[entries], wanted)


def alone(inputs: SelfInputs, entry: int, place: int, size: int) -> SelfInputs:
    """The same entry at another place of a batch of inactive entries."""
    q = torch.full((size, inputs.q.shape[1]), math.nan, dtype=inputs.q.dtype, device=inputs.q.device)
    rows, positions = torch.full_like(inputs.rows[:1], -1).repeat(size), inputs.positions[:1].repeat(size)
    q[place], rows[place], positions[place] = inputs.q[entry], inputs.rows[entry], inputs.positions[entry]
    return dataclasses.replace(inputs, q=q, rows=rows, positions=positions)


def check_self_batch_mates(device: torch.device, dtype: torch.dtype) -> None:
    inputs = self_inputs(SelfCase(2, 64, (20, 20, 20, 71, 5, 1), beam=3), device, dtype)
    together = inputs.run()
    for entry, place, size in ((0, 0, 1), (1, 6, 9), (3, 1, 2), (4, 4, 5), (5, 3, 4)):
        assert torch.equal(alone(inputs, entry, place, size).run()[place], together[entry])


def test_self_bits_do_not_depend_on_the_batch(cpu: torch.device) -> None:
    check_self_batch_mates(cpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_self_bits_do_not_depend_on_the_batch_on_the_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    check_self_batch_mates(cuda, dtype)


def check_cross_batch_mates(device: torch.device, dtype: torch.dtype) -> None:
    inputs = cross_inputs(CrossCase(2, 64, (3, 8, 1), (40, 75, 9)), device, dtype)
    together = inputs.run()
    for group in range(3):
        start, count = int(inputs.group_starts[group]), int(inputs.group_counts[group])
        for entry in range(start, start + count):
            one = dataclasses.replace(
                inputs,
                q=inputs.q[entry : entry + 1],
                group_slots=inputs.group_slots[group : group + 1],
                group_starts=torch.zeros_like(inputs.group_starts[:1]),
                group_counts=torch.ones_like(inputs.group_counts[:1]),
            )
            assert torch.equal(one.run()[0], together[entry])


def test_cross_bits_do_not_depend_on_the_batch(cpu: torch.device) -> None:
    check_cross_batch_mates(cpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cross_bits_do_not_depend_on_the_batch_on_the_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    check_cross_batch_mates(cuda, dtype)


def check_group_batch_mates(device: torch.device, dtype: torch.dtype) -> None:
    case = GroupCase(2, 64, (3, 8, 1, -2), (40, 75, 9, 3), (30, 2, 0, 0))
    for inputs in every_kernel(group_inputs(case, device, dtype)):
        assert isinstance(inputs, SelfInputs)
        assert inputs.groups is not None
        together = inputs.run()
        for group in range(3):
            slot, start, count = (t[group : group + 1] for t in inputs.groups)
            here = slice(int(start), int(start) + int(count))
            one = dataclasses.replace(
                inputs,
                q=inputs.q[here],
                rows=inputs.rows[here].clone(),
                positions=inputs.positions[here].clone(),
                groups=(slot, torch.zeros_like(start), count),
            )
            if inputs.lists is not None:
                one = one.listed()
            assert torch.equal(one.run(), together[here])


def test_group_bits_do_not_depend_on_the_batch(cpu: torch.device) -> None:
    check_group_batch_mates(cpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_group_bits_do_not_depend_on_the_batch_on_the_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    check_group_batch_mates(cuda, dtype)


@pytest.mark.gpu
def test_heads_of_a_program_change_no_bit(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels for groups are for Hopper")
    cross = cross_inputs(CrossCase(16, 64, (3, 8, 1), (40, 75, 9)), cuda, torch.bfloat16)
    own = group_inputs(GroupCase(16, 64, (4, 1), (40, 3), (31, 0)), cuda, torch.bfloat16).listed()
    for inputs, positions in ((cross, 32), (own, 16)):
        outs = [dataclasses.replace(inputs, tiles=GroupTiles(heads, positions)).run() for heads in (1, 2, 4, 8, 16)]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_groups_beyond_the_usual_number_are_taken_in_turns(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels for groups are for Hopper")
    counts = (3, 0, 8, 1, 0, 4, 2, 0) * 20  # unused ones between and behind the others
    cross = cross_inputs(CrossCase(16, 64, counts, (40, 5, 75, 9, 3, 33, 64, 1) * 20), cuda, torch.bfloat16)
    case = GroupCase(16, 64, counts, (40, 3, 17, 0, 2, 31, 16, 5) * 20, (31, 0, 4, 0, 1, 31, 0, 2) * 20)
    own = group_inputs(case, cuda, torch.bfloat16).listed()
    for inputs, positions in ((cross, 32), (own, 16)):
        every = dataclasses.replace(inputs, tiles=GroupTiles(4, positions))
        whole = every.run()
        for usual in (1, 5, 40, 80, 159, 160, 1000):
            for ready in (False, True):
                turns = dataclasses.replace(every, usual_groups=usual, ready=ready).run()
                torch.testing.assert_close(turns, whole, rtol=0, atol=0, equal_nan=True)


def test_programs_and_turns_reach_every_group() -> None:
    assert group_programs(320, None) == (320, 1)
    assert group_programs(320, 80) == (80, 4)
    assert group_programs(320, 79) == (79, 8)
    assert group_programs(320, 1000) == (320, 1)
    assert group_programs(320, 0) == (10, 32)
    assert group_programs(96, 24) == (96, 1)  # as many as find room at once
    for groups in range(1, 300):
        for usual in (1, 2, 3, 17, 64, 199):
            programs, turns = group_programs(groups, usual)
            assert 1 <= programs <= groups <= programs * turns
            assert turns <= 32


def test_heads_of_a_program_divide_all_heads() -> None:
    assert [group_constants(h, 64, GroupTiles(4, 16))["HP"] for h in (1, 2, 3, 6, 16)] == [1, 2, 1, 2, 4]


def test_the_kernels_for_groups_need_no_shared_memory_and_no_barrier() -> None:
    """In a process of its own: here triton.jit means the interpreter."""
    code = """
import torch
from kernels.compile_ahead import compile_kernel
from kernels.decode_attention.jobs import group_jobs
for job in group_jobs(1024, 16, torch.bfloat16):
    compiled = compile_kernel(job, 90)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared == 0 and "bar.sync" not in ptx, job[3]
    assert ptx.count("ld.global.v4") >= 8, "operands are not loaded 16 bytes at a time"
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_tiles_for_groups_are_refused_without_hopper(cpu: torch.device) -> None:
    cross = cross_inputs(CrossCase(1, 64, (1,), (4,)), cpu, torch.float32)
    with pytest.raises(ValueError, match="Hopper: leave out tiles"):
        dataclasses.replace(cross, tiles=GroupTiles(1, 16)).run()


def test_every_failed_case_is_reported_by_name(cpu: torch.device) -> None:
    found = list(attention_failures(cpu, torch.float32, -1.0, large=False))
    names = [case.name for case in self_cases(large=False)] + [case.name for case in group_cases(large=False)]
    names += [case.name for case in cross_cases(large=False)] + [case.name for case in encoder_cases(large=False)]
    assert [line.split()[3].rstrip(":") for line in found] == names
    assert {line.split()[0] for line in found} == {"Self", "Group", "Cross", "Encoder"}


def test_large_scores_do_not_overflow(cpu: torch.device) -> None:
    inputs = self_inputs(SelfCase(1, 16, (40, 3)), cpu, torch.float32)
    assert check_inputs(dataclasses.replace(inputs, q=inputs.q * 1e4)) <= LIMITS[torch.float32]


def test_no_entries_and_no_groups(cpu: torch.device) -> None:
    inputs, groups = (
        self_inputs(SelfCase(1, 16, (4,)), cpu, torch.float32),
        cross_inputs(CrossCase(1, 16, (1,), (4,)), cpu, torch.float32),
    )
    assert dataclasses.replace(inputs, q=inputs.q[:0], rows=inputs.rows[:0], positions=inputs.positions[:0]).run().shape == (
        0,
        16,
    )
    none = {name: getattr(groups, name)[:0] for name in ("group_slots", "group_starts", "group_counts")}
    assert dataclasses.replace(groups, **none).run().isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_self_graph_follows_inputs_changed_in_place(dtype: torch.dtype, cuda: torch.device) -> None:
    cases = [
        SelfCase(4, 64, lengths, beam=4, max_positions=90)
        for lengths in ((3, 3, 3, 3, 0, 0, 0, 1), (90, 64, 65, 1, 7, 7, 0, 2))
    ]
    first, *others = (self_inputs(case, cuda, dtype, seed) for seed, case in enumerate((*cases, *cases)))
    first.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_self_attention(
            first.q, first.cells, first.ancestry, first.rows, first.positions, num_heads=first.num_heads
        )
    for inputs in others:
        for name in ("q", "cells", "ancestry", "rows", "positions"):
            getattr(first, name).copy_(getattr(inputs, name))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, inputs.run())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cross_graph_follows_inputs_changed_in_place(dtype: torch.dtype, cuda: torch.device) -> None:
    names = ("q", "cells", "source_lengths", "group_slots", "group_starts", "group_counts")
    # As many entries and slots in each, so that all fit the captured buffers.
    cases = [CrossCase(4, 64, counts, lengths) for counts, lengths in (((4, 1, 0), (3, 90, 9)), ((1, 0, 4), (90, 1, 33)))]
    first, *others = (cross_inputs(case, cuda, dtype, seed) for seed, case in enumerate((*cases, *cases)))
    first.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    out = torch.empty(first.q.shape, dtype=dtype, device=cuda)
    with torch.cuda.graph(graph):
        decode_cross_attention(*(getattr(first, name) for name in names), num_heads=first.num_heads, out=out)
    for inputs in others:
        for name in names:
            getattr(first, name).copy_(getattr(inputs, name))
        out.fill_(math.nan)
        graph.replay()
        torch.testing.assert_close(out, inputs.run(), rtol=0, atol=0, equal_nan=True)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"q": torch.zeros(3, 2, 16)}, r"want \[R, D\]"),
        ({"q": torch.zeros(32, 3).T}, "contiguous rows"),
        ({"q": torch.zeros(3, 32, dtype=torch.float64)}, "want float32, float16 or bfloat16"),
        ({"num_heads": 3}, "does not divide into 3 heads"),
        ({"num_heads": 4}, "head_dim is 8; choose num_heads"),
        ({"cells": torch.zeros(5, 7, 2, 2, 8)}, "cells is"),
        ({"cells": torch.zeros(5, 7, 2, 2, 16, dtype=torch.float16)}, "convert one of them"),
        ({"cells": torch.zeros(5, 7, 2, 4, 16)[:, :, :, ::2]}, "pass one layer of the cache"),
        ({"ancestry": zeros(5, 6)}, r"want \[5, at least 7\]"),
        ({"ancestry": zeros(5, 7).long()}, "ancestry is torch.int64; convert it to int32"),
        ({"rows": zeros(4)}, r"rows is \(4,\); want \[3\]"),
        ({"rows": zeros(6)[::2]}, "rows must be contiguous"),
        ({"positions": zeros(3).long()}, "positions is torch.int64"),
        ({"out": torch.zeros(3, 31)}, "want contiguous"),
    ],
)
def test_bad_self_input_is_refused(kwargs: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "q": torch.zeros(3, 32),
        "cells": torch.zeros(5, 7, 2, 2, 16),
        "ancestry": zeros(5, 8),
        "rows": zeros(3),
        "positions": zeros(3),
        "num_heads": 2,
    }
    with pytest.raises(ValueError, match=message):
        decode_self_attention(**(good | kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cross_cells": torch.zeros(5, 7, 2, 1, 32)}, "cross_cells is"),
        ({"source_lengths": zeros(4)}, r"source_lengths is \(4,\); want \[5\]"),
        ({"group_starts": zeros(3)}, r"group_starts is \(3,\); want \[2\]"),
        ({"group_counts": zeros(2).long()}, "group_counts is torch.int64; convert it to int32"),
        ({"out": torch.zeros(3, 32, dtype=torch.float16)}, "want contiguous torch.float32"),
    ],
)
def test_bad_cross_input_is_refused(kwargs: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "q": torch.zeros(3, 32),
        "cross_cells": torch.zeros(5, 7, 2, 2, 16),
        "source_lengths": zeros(5),
        "group_slots": zeros(2),
        "group_starts": zeros(2),
        "group_counts": zeros(2),
        "num_heads": 2,
    }
    with pytest.raises(ValueError, match=message):
        decode_cross_attention(**(good | kwargs))  # type: ignore[arg-type]
