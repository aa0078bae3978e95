"""Launch sequences captured once and replayed: one CUDA graph for each key, all of them sharing one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from engine.device_memory import require_free_memory
from engine.step_clock import StepClock

# What the driver and torch need besides the pass's own tensors. Where torch has not the 512 bytes to register a graph, the
# graph's destructor ends the process (torch 2.11): running out must show before.
_CAPTURE_BYTES = 16 << 20


class CapturedSteps:
    """Runs a launch sequence; on a CUDA device from its graph, which is captured at the key's first use.

    Graphs share memory: none may rely on what another left outside its fixed buffers, and one replays at a time. On a CPU
    (Triton's interpreter) the sequence just runs. clock: notes when each run begins and ends.
    """

    def __init__(self, device: torch.device, clock: StepClock | None = None) -> None:
        self._device = device
        self._clock = clock
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        # One stream for all: memory freed on one is not given to another, and the GEMM library keeps a workspace for each.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def has(self, key: Hashable) -> bool:
        """True when running this key captures nothing any more."""
        return self._device.type != "cuda" or key in self._graphs

    def capture(self, key: Hashable, sequence: Callable[[], None]) -> None:
        """Capture a sequence; it runs once at the end, on inputs that must do no harm: what cannot run fails here.

        Raises torch.OutOfMemoryError; then nothing is captured, and the same key may be tried again.
        """
        if self.has(key):
            return
        require_free_memory(_CAPTURE_BYTES, self._device, "capturing a pass")
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # relaxed: what a first launch does besides (compiling, loading modules, making a handle) may happen within
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                self._sequence(sequence)
        finally:
            torch.cuda.set_stream(stream)  # when a capture cannot be ended, torch leaves its stream the current one
        graph.replay()
        self._graphs[key] = graph

    def run(self, key: Hashable, sequence: Callable[[], None]) -> None:
        """Replay the graph of this key, which has been captured; without a GPU, run the sequence."""
        if self._device.type == "cuda":
            self._graphs[key].replay()
        else:
            self._sequence(sequence)

    def _sequence(self, sequence: Callable[[], None]) -> None:
        if self._clock is None:
            sequence()
            return
        self._clock.start()
        sequence()
        self._clock.end()
