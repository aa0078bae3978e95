"""Figures of the machine and of single decode steps: read bandwidth, kernels per step, idle time between kernels."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine

_LONG_GAP_US = 50.0
_CPU_BUFFER_VALUES = 32 << 20
_SMALL_BYTES = 1 << 20  # torch keeps pieces up to here apart from larger ones


@dataclass(frozen=True, slots=True)
class StepProfile:
    """What the profiler saw of a whole decode phase on the device, per step.

    kernels: launches without copies. idle_us: device idle between its first and last work. gapless_share: share of steps
    without an idle gap above 50 us. busy_share: device busy over the phase.
    """

    kernels: float
    copies: float
    idle_us: float
    longest_gap_us: float
    gapless_share: float
    busy_share: float

    @classmethod
    def from_work(cls, work: Sequence[tuple[str, float, float]], num_steps: int) -> StepProfile:
        """From (name, start, end) in microseconds of everything that ran on the device; there must be something."""
        spans = sorted((start, end) for _, start, end in work)
        gaps = []
        busy_until = spans[0][1]
        for start, end in spans[1:]:
            if start > busy_until:
                gaps.append(start - busy_until)
            busy_until = max(busy_until, end)
        copies = sum(name.startswith(("Memcpy", "Memset")) for name, _, _ in work)
        idle, phase = sum(gaps), busy_until - spans[0][0]
        long_gaps = sum(gap > _LONG_GAP_US for gap in gaps)
        return cls(
            kernels=(len(work) - copies) / num_steps,
            copies=copies / num_steps,
            idle_us=idle / num_steps,
            longest_gap_us=max(gaps, default=0.0),
            gapless_share=max(0.0, 1.0 - long_gaps / num_steps),
            busy_share=1.0 - idle / phase if phase > 0 else 1.0,
        )


def profile_decode(engine: OurEngine, inputs: CellInputs) -> StepProfile | None:
    """Profile one decode phase; None on the CPU. The profiler costs time of its own: no figure of speed comes from here."""
    if not engine.config.device.startswith("cuda"):
        return None
    engine.encode(inputs)
    work = device_work(lambda: engine.decode(inputs))
    return StepProfile.from_work(work, inputs.num_steps) if work else None


def device_work(run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of everything that `run` has a CUDA device do, as the profiler sees it."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    ]


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that this device reads: the sum of 4 GiB on a GPU, of 128 MiB on a CPU."""
    if device.type == "cuda":
        from kernels.bench import measure_machine

        bytes_per_s = measure_machine().bytes_per_s
        torch.cuda.empty_cache()
        return bytes_per_s
    buffer = torch.ones(_CPU_BUFFER_VALUES)
    best_s = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        buffer.sum()
        best_s = min(best_s, time.perf_counter() - start)
    return buffer.numel() * 4 / best_s


class MemoryMeter:
    """Peak bytes that torch holds on the device since `start`, over what it held then; None on a CPU.

    Held, not allocated: the memory of captured passes counts, in use or not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0
        self._plugs: list[Tensor] = []

    def start(self) -> None:
        """Forget earlier peaks; what is held now is the baseline."""
        gc.collect()
        self.settle()
        if self._device.type == "cuda":
            self._plugs = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._holes()]
            self._baseline = torch.cuda.memory_reserved(self._device)

    def _holes(self) -> list[int]:
        """Bytes of each free part of what torch holds and cannot give back, because another part is in use, largest first.
        Whatever came later would go in there unseen: they are taken for as long as the meter lives."""
        snapshot = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        common = [segment for segment in snapshot if tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)]
        free = [block["size"] for segment in common for block in segment["blocks"] if block["state"] == "inactive"]
        return sorted((size for size in free if size > _SMALL_BYTES), reverse=True)

    def settle(self) -> None:
        """Forget earlier peaks and give back what is not used, such as what making a random model took."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int | None:
        """Since `start` or the last `settle`, over the baseline of `start`."""
        if self._device.type != "cuda":
            return None
        return int(torch.cuda.max_memory_reserved(self._device)) - self._baseline
