"""The replay check itself: it passes on the real ops, and notices every kind of wrong result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels.checks import LIMITS
from kernels.replay_check import check_replays, main, replay
from kernels.replay_memory import TINY, StepSizes
from kernels.replay_parts import Op
from kernels.replay_sets import RecordedSet, draw_set, record_sets
from kernels.replay_step import Step

SEEN_THROUGH = {"expert_hidden0", "expert_hidden1", "expert_hidden2"}  # scratch: right when the expert outputs are


@pytest.fixture(scope="module")
def step(cpu: torch.device) -> Step:
    return Step(TINY, torch.float16, cpu, LIMITS[torch.float16])


@pytest.fixture(scope="module")
def recorded(step: Step) -> list[RecordedSet]:
    sets, failures = record_sets(step, 2)
    assert failures == []
    return sets


def test_replays_in_the_interpreter_repeat_the_checked_run(step: Step, recorded: list[RecordedSet]) -> None:
    assert not torch.equal(recorded[0].after, recorded[1].after)
    report = replay(step, recorded, 2)
    assert report.ok and report.replays == 2 and len(report.lines()) == 1


def test_one_wrong_byte_is_counted_and_named(step: Step, recorded: list[RecordedSet]) -> None:
    wrong = recorded[0].after.clone()
    span = step.arena.spans["values"]
    wrong[span.start + 5] ^= 1
    end = step.arena.spans["entry_slots"].stop
    assert end % 256  # the byte behind it belongs to no buffer
    wrong[end] ^= 1
    report = replay(step, [dataclasses.replace(recorded[0], after=wrong)], 1)
    assert not report.ok and report.wrong_replays == 1
    assert report.differing == {"values": 1, "memory between the buffers": 1}
    assert "FAILED values: 1 bytes differed" in report.lines()


def disturb(buffer: torch.Tensor) -> None:
    if buffer.dtype == torch.bool:
        buffer.logical_not_()
    else:
        buffer.add_(1)


def test_every_twin_notices_a_wrong_result(step: Step, recorded: list[RecordedSet]) -> None:
    sentences = draw_set(step, 1)
    assert torch.equal(step.arena.memory, recorded[1].before)  # a set is drawn alike every time
    memory, unnoticed = step.arena.memory, []
    for op in step.ops:
        before = memory.clone()
        op.launch()
        right = memory.clone()
        views = step.arena.views_of(before)
        for name in set(op.writes) - SEEN_THROUGH:
            disturb(step.arena.views[name])
            if op.twin(views, step.arena.views, sentences) <= op.limit:
                unnoticed.append(f"{op.name}: {name}")
            memory.copy_(right)
    assert unnoticed == []


def test_a_write_to_another_buffer_is_named(step: Step, recorded: list[RecordedSet]) -> None:
    whole = step.ops
    embedding = next(op for op in whole if op.name == "embed source")

    def launch() -> None:
        embedding.launch()
        step.arena.views["q"][0, 0] = 1.0

    step.ops = [Op(embedding.name, launch, embedding.writes, embedding.twin, embedding.limit)]
    try:
        assert step.run_checked(draw_set(step, 0)) == ["embed source: wrote to q"]
    finally:
        step.ops = whole


def test_sets_differ_in_what_a_step_depends_on(step: Step, recorded: list[RecordedSet]) -> None:
    views = [step.arena.views_of(one.after) for one in recorded]
    for name in (
        "positions",
        "rows",
        "active",
        "group_counts",
        "group_slots",
        "expert_ids0",
        "token_starts",
        "source_lengths",
    ):
        assert not torch.equal(views[0][name], views[1][name]), name
    for one in views:
        assert one["active"].any() and not one["active"].all()
        assert one["x"][~one["active"]].isnan().any() and one["values"][one["active"]].isfinite().all()


def test_bad_arguments_and_a_missing_gpu_are_said(capsys: pytest.CaptureFixture[str], cpu: torch.device) -> None:
    with pytest.raises(SystemExit):
        main(["--replays", "0"])
    assert "must be 1 or more" in capsys.readouterr().err
    assert main(["--replays", "3"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [TINY, StepSizes()], ids=["tiny", "real"])
def test_one_graph_replayed_on_the_gpu(sizes: StepSizes, dtype: torch.dtype, cuda: torch.device) -> None:
    report, failures = check_replays(sizes, dtype, cuda, replays=200, num_sets=4)
    assert failures == []
    assert report.ok, report.lines()
