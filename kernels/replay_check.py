"""All ops captured in one CUDA graph and replayed with inputs that change every time: python -m kernels.replay_check (GPU).

Each set of inputs is run once op by op, every op against its slow twin; then the graph is replayed over the sets in turn,
and every byte of every result, state changed in place included, must be that of the first run. Nothing may be allocated
meanwhile. Sets differ in tokens, positions, cache rows, groups, ancestry, active entries, and so in routing; idle entries,
padding, cells of nobody and outputs hold NaN, unused indices lie far out of range.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.checks import DTYPES, LIMITS
from kernels.compile_ahead import Job, compile_ahead
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.replay_memory import EXPERT_TILES, TINY, StepSizes
from kernels.replay_sets import RecordedSet, record_sets
from kernels.replay_step import Step


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """differing: names of results that were not those of the first run, and how many of their bytes ever differed."""

    replays: int
    wrong_replays: int
    differing: dict[str, int]
    allocations: int
    allocated_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all replays gave the recorded bytes and nothing was allocated."""
        return not (self.wrong_replays or self.differing or self.allocations or self.allocated_bytes)

    def lines(self) -> list[str]:
        """The summary, and a line for each buffer that differed."""
        summary = (
            f"{self.replays} replays in {self.seconds:.1f} s: {self.wrong_replays} differ from the first run; "
            f"{self.allocations} allocations, {self.allocated_bytes:+d} bytes allocated meanwhile"
        )
        return [summary, *(f"FAILED {name}: {count} bytes differed" for name, count in self.differing.items())]


class Comparison:
    """Compares the step's memory with what it should be, byte for byte, and adds up the differences on the device."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.expected = torch.empty_like(memory)
        self.ever = torch.zeros(memory.shape, dtype=torch.bool, device=memory.device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=memory.device)

    def run(self) -> None:
        """Count this replay when any byte differs, and remember which."""
        now = self._memory != self.expected
        self.ever |= now
        self.wrong += now.any()


def replay(step: Step, sets: list[RecordedSet], replays: int) -> ReplayReport:
    """Run the step `replays` times over the sets in turn; on a GPU from one graph, on a CPU just so. Reads back once."""
    comparison = Comparison(step.arena.memory)
    step.arena.memory.copy_(sets[0].before)
    run, compare = _captured(step.run, step.device), _captured(comparison.run, step.device)
    comparison.ever.zero_()
    comparison.wrong.zero_()
    before = _allocations(step.device)
    started = time.perf_counter()
    for i in range(replays):
        chosen = sets[i % len(sets)]
        step.arena.memory.copy_(chosen.before)
        comparison.expected.copy_(chosen.after)
        run()
        compare()
    after = _allocations(step.device)
    wrong = int(comparison.wrong)  # waits for the device
    seconds = time.perf_counter() - started
    found = {name: int(comparison.ever[span].sum()) for name, span in step.arena.spans.items()}
    named = sum(found.values())
    found["memory between the buffers"] = int(comparison.ever.sum()) - named
    differing = {name: count for name, count in found.items() if count}
    return ReplayReport(replays, wrong, differing, after[0] - before[0], after[1] - before[1], seconds)


def _allocations(device: torch.device) -> tuple[int, int]:
    """(allocations so far, bytes allocated now)."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_stats(device)["allocation.all.allocated"], torch.cuda.memory_allocated(device)


def _captured(sequence: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The sequence's graph on a GPU (it runs once on the way), else the sequence."""
    if device.type != "cuda":
        return sequence
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        sequence()  # compiles kernels and makes library handles, which a capture must not
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        sequence()
    return graph.replay


def expert_jobs(sizes: StepSizes, dtype: torch.dtype) -> list[Job]:
    """Compile jobs of the kernels that take longest to compile, the experts', for `kernels.compile_ahead`."""
    z = sizes
    return [job for tiles in EXPERT_TILES for job in ffn_jobs(z.d_model, z.d_ff, z.top_k, 4, 0, tiles, dtype)]


def check_replays(
    sizes: StepSizes, dtype: torch.dtype, device: torch.device, *, replays: int, num_sets: int
) -> tuple[ReplayReport, list[str]]:
    """Record and replay; the report, and what failed against the slow twins."""
    step = Step(sizes, dtype, device, LIMITS[dtype])
    sets, failures = record_sets(step, num_sets)
    return replay(step, sets, replays), failures


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit 1 when a twin disagrees, a replay differs or something was allocated, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--sets", type=int, default=16, help="sets of inputs that take turns")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tiny", action="store_true", help="the sizes of the CPU test")
    options = parser.parse_args(arguments)
    if options.replays < 1 or options.sets < 1:
        parser.error("--replays and --sets must be 1 or more")
    if not torch.cuda.is_available():
        print("replay_check needs a CUDA GPU; on a CPU run: pytest tests/kernels/test_replay.py", file=sys.stderr)
        return 2
    sizes = TINY if options.tiny else StepSizes()
    jobs = [job for name in options.dtype for job in expert_jobs(sizes, DTYPES[name])]
    compile_ahead(jobs, capability=10 * torch.cuda.get_device_capability()[0])
    ok = True
    for name in options.dtype:
        report, failures = check_replays(
            sizes, DTYPES[name], torch.device("cuda"), replays=options.replays, num_sets=options.sets
        )
        print(f"{name}: {options.sets} sets against the slow twins: {len(failures)} failures", flush=True)
        print(*(f"FAILED {line}" for line in failures[:40]), *report.lines(), sep="\n", flush=True)
        ok &= report.ok and not failures
    print("replay check passed" if ok else "replay check FAILED", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
