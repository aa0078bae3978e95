"""How busy this machine's GPUs are, as nvidia-smi tells it: the share of time in which any kernel ran."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import defaultdict
from types import TracebackType

_PERIOD_MS = 100
_END_S = 5.0  # for nvidia-smi to end once told


class GpuBusy:
    """Samples while it is entered; nothing where there is no nvidia-smi.

    with GpuBusy() as gpus: ...
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, str, float]] = []  # monotonic seconds, index of the GPU, percent
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> GpuBusy:
        if (program := shutil.which("nvidia-smi")) is not None:
            query = ["--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", f"--loop-ms={_PERIOD_MS}"]
            self._process = subprocess.Popen([program, *query], stdout=subprocess.PIPE, text=True)
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._reader.join(_END_S)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            index, _, percent = line.partition(",")
            if percent.strip().isdigit():  # "[N/A]" on GPUs that do not tell, half a line at the end
                self._samples.append((time.monotonic(), index.strip(), float(percent)))

    def between(self, begin_s: float, end_s: float) -> dict[str, float]:
        """Mean share in 0..1 of samples taken between two moments of the monotonic clock, by index of the GPU."""
        shares: dict[str, list[float]] = defaultdict(list)
        for at_s, index, percent in self._samples:
            if begin_s <= at_s < end_s:
                shares[index].append(percent / 100)
        return {index: sum(values) / len(values) for index, values in sorted(shares.items())}
