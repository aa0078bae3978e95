"""Where a decode step goes: the captured step without the launches of one part beside the whole step.

*A held position.* The sentences of a cell are decoded up to the middle step, which is then run again and again instead of
the next: before every replay, whole or not, one more captured pass puts back the search's tables and what the recorded step
had left in its results. Its time is not counted. So `advance` runs as it always does, every replay feeds the same tokens
at the same position, and keys and values go to the same cells.

*Left out* (`step_tape.py`). The launches of a part are missing from the captured step; their results are those of the
complete step, so the others do what they did. Where a part adds to the residual stream (maps with a residual, expert
sums), that is missing, too, and rows may go to other experts behind it. Results that nobody has just written are read
from memory, not L2: by their size some 0.1 us a launch too little. Without a map that asks L2 for weights on behalf of a
later launch (cross out, first dense), that launch waits longer: such maps show less than they take. us added: the whole
step's time less that of the step without the part, median over pairs that take turns. Launches overlap, so the parts need
not add up to the step.

*Beside it*: the launches (counted by the profiler, at the end), what reading the part's bytes takes at the bandwidth
measured, and what a launch that does nothing costs in a row of such (one program that waits and reads one number).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from engine.bench.floor import StepPart, step_bytes_by_part
from engine.bench.inputs import CellInputs
from engine.bench.measure import device_work
from engine.bench.ours import OurEngine
from engine.bench.step_tape import StepTape, table_copies
from engine.config import ModelConfig
from engine.cuda_graphs import CapturedSteps
from kernels.beam_search import advance_sentences
from kernels.beam_search.tables import BeamTables
from kernels.head_topk import TopTokens

REPEATS = 40
_WARM_UPS = 300  # whole steps before anything is timed
_EMPTY_LAUNCHES = 100
_WHOLE, _RESTORE = "whole", "restore"


@dataclass(frozen=True, slots=True)
class AblatedPart:
    """launches and added_us: of the whole step less the step without this part; floor_us: bytes at the read bandwidth."""

    part: StepPart
    launches: int
    added_us: float
    read_bytes: int
    floor_us: float


@dataclass(frozen=True, slots=True)
class StepAblation:
    """step: its number from 1 among num_steps. step_us: median over all replays of the whole step. empty_launch_us: one
    launch that does nothing. experts_touched: distinct experts per sparse layer in this step."""

    cell: str
    step: int
    num_steps: int
    repeats: int
    step_us: float
    launches: int
    empty_launch_us: float
    experts_touched: float
    parts: tuple[AblatedPart, ...]

    @property
    def sum_us(self) -> float:
        """Of all parts; less than the step where launches overlap."""
        return sum(part.added_us for part in self.parts)

    @property
    def read_bytes(self) -> int:
        """Of all parts."""
        return sum(part.read_bytes for part in self.parts)

    @property
    def floor_us(self) -> float:
        """Reading every part's bytes."""
        return sum(part.floor_us for part in self.parts)

    @property
    def uncounted_launches(self) -> int:
        """Launches that belong to no part: then the table lacks something that the step does."""
        return self.launches - sum(part.launches for part in self.parts)

    def table(self) -> str:
        """As text."""
        head = f"{self.cell}, step {self.step} of {self.num_steps}: {self.step_us:.1f} us, {self.repeats} pairs a part"
        lines = [head, f"  {'part':<24} {'launches':>8} {'us added':>9} {'MB':>8} {'bytes alone, us':>15} {'share':>6}"]
        for part in self.parts:
            floor = f"{part.read_bytes / 1e6:8.1f} {part.floor_us:15.1f}" if part.read_bytes else f"{'-':>8} {'-':>15}"
            share = f"{part.added_us / self.step_us:6.1%}"
            lines.append(f"  {part.part:<24} {part.launches:8} {part.added_us:9.1f} {floor} {share:>6}")
        lines.append(
            f"  {'all of these':<24} {self.launches - self.uncounted_launches:8} {self.sum_us:9.1f} "
            f"{self.read_bytes / 1e6:8.1f} {self.floor_us:15.1f} {self.sum_us / self.step_us:6.1%}"
        )
        lines.append(f"  {'empty launches':<24} {self.launches:8} {self.launches * self.empty_launch_us:9.1f}")
        if self.uncounted_launches:
            lines.append(f"  {self.uncounted_launches} of {self.launches} launches belong to none of these parts")
        lines.append(f"  experts touched per sparse layer: {self.experts_touched:.1f}")
        return "\n".join(lines)


def require_ablation(config: ModelConfig, device: torch.device) -> None:
    """Raises ValueError where no step of this model is captured."""
    from engine.device_runner import HEAD_DIMS, supports_kernels

    if device.type != "cuda":
        raise ValueError("--ablate takes launches out of a captured decode step, and only a GPU has one: give --device cuda")
    if not supports_kernels(config):
        raise ValueError(f"--ablate: the kernels take heads of {HEAD_DIMS} features, and this model has others")


@torch.inference_mode()
def ablate_step(
    engine: OurEngine, inputs: CellInputs, config: ModelConfig, bytes_per_s: float, *, repeats: int = REPEATS
) -> StepAblation:
    """Measure the middle step of this cell. The engine has decoded the cell before, so that its kernels are compiled; it is
    empty before and after. bytes_per_s: what the device reads."""
    from engine.device_runner import DeviceRunner

    runner = engine.runner
    if not isinstance(runner, DeviceRunner):
        raise ValueError("only a runner that captures its steps can leave launches out of one")
    step_number = (inputs.num_steps + 1) // 2
    engine.encode(inputs)
    engine.start(inputs)
    for _ in range(step_number - 1):
        runner.decode()
    step, tables = runner.next_step()
    tape = StepTape(saved=table_copies(tables))
    with tape.recording():
        step()
    held = _HeldStep(torch.device(engine.config.device), tape.restore)
    parts = tape.parts
    for part in (None, *parts):
        with tape.without(part):
            held.capture(part or _WHOLE, step)
    rows = (_EMPTY_LAUNCHES, 2 * _EMPTY_LAUNCHES)
    for count in rows:
        held.capture(count, functools.partial(_launch_nothing, count, tape.top_tokens, tables, config.eos_token_id))
    held.times_us((_WHOLE,), _WARM_UPS)
    pairs = {part: held.times_us((_WHOLE, part), repeats) for part in parts}
    empty_us, twice_us = (statistics.median(times) for times in held.times_us(rows, repeats))
    # The profiler comes last: it may slow down what runs after it.
    launches = {key: held.launches(key) for key in (_WHOLE, *parts)}
    runner.clear()
    experts = tape.experts_touched()
    read = step_bytes_by_part(
        config,
        engine.config,
        inputs.cell,
        experts_touched=experts,
        source_tokens=inputs.source_token_ids.shape[1],
        target_tokens=2 * step_number,
    )
    return StepAblation(
        cell=str(inputs.cell),
        step=step_number,
        num_steps=inputs.num_steps,
        repeats=repeats,
        step_us=statistics.median(us for one in pairs.values() for us in one[0]),
        launches=launches[_WHOLE],
        empty_launch_us=(twice_us - empty_us) / _EMPTY_LAUNCHES,
        experts_touched=experts,
        parts=tuple(
            AblatedPart(
                part=part,
                launches=launches[_WHOLE] - launches[part],
                added_us=statistics.median(whole - rest for whole, rest in zip(*pairs[part], strict=True)),
                read_bytes=round(read[part]),
                floor_us=read[part] / bytes_per_s * 1e6,
            )
            for part in parts
        ),
    )


class _HeldStep:
    """Captured passes of which each runs from the same state."""

    def __init__(self, device: torch.device, restore: Callable[[], None]) -> None:
        self._graphs = CapturedSteps(device)
        self._restore = restore
        self._sequences: dict[Hashable, Callable[[], None]] = {}
        self.capture(_RESTORE, restore)

    def capture(self, key: Hashable, sequence: Callable[[], None]) -> None:
        """Capture a pass, which runs once in the end."""
        self._restore()
        self._graphs.capture(key, sequence)
        self._sequences[key] = sequence

    def times_us(self, keys: Sequence[Hashable], repeats: int) -> list[list[float]]:
        """Of each pass, by the device's clock; they take turns."""
        marks = []
        for _ in range(repeats):
            for key in keys:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                self._graphs.run(_RESTORE, self._restore)
                begin.record()
                self._graphs.run(key, self._sequences[key])
                end.record()
                marks.append((begin, end))
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) * 1e3 for begin, end in marks]
        return [times[place :: len(keys)] for place in range(len(keys))]

    def launches(self, key: Hashable) -> int:
        """Kernels of the pass alone."""
        self._graphs.run(_RESTORE, self._restore)
        work = device_work(lambda: self._graphs.run(key, self._sequences[key]))
        return sum(not name.startswith(("Memcpy", "Memset")) for name, _, _ in work)


def _launch_nothing(count: int, top: TopTokens, tables: BeamTables, eos_token_id: int) -> None:
    """So many search steps of one group that is not in use."""
    unused = torch.zeros(1, dtype=torch.int32, device=top.values.device)
    beams = torch.zeros(len(top.values), dtype=torch.int32, device=top.values.device)
    for _ in range(count):
        advance_sentences(top.values, top.token_ids, unused, unused, unused, beams, tables, eos_token_id=eos_token_id)
