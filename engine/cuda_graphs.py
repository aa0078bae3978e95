"""Launch sequences captured once and replayed: one CUDA graph for each key, all of them sharing one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class CapturedSteps:
    """Runs a launch sequence; on a CUDA device from its graph, which is captured at the key's first use.

    Graphs share memory: none may rely on what another left outside its fixed buffers, and one replays at a time. On a CPU
    (Triton's interpreter) the sequence just runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    def has(self, key: Hashable) -> bool:
        """True when running this key captures nothing any more."""
        return self._device.type != "cuda" or key in self._graphs

    def capture(self, key: Hashable, sequence: Callable[[], None]) -> None:
        """Capture a sequence; it runs twice on the way, on inputs that must do no harm."""
        if self.has(key):
            return
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            sequence()  # compiles kernels and makes library handles, which a capture must not
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            sequence()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graphs[key] = graph

    def run(self, key: Hashable, sequence: Callable[[], None]) -> None:
        """Replay the graph of this key, which has been captured; without a GPU, run the sequence."""
        if self._device.type == "cuda":
            self._graphs[key].replay()
        else:
            sequence()
