"""Compile kernels without a GPU, in a pool of processes: fills Triton's cache and reports registers, shared memory
and occupancy.

Start it before this process touches CUDA: workers are forked, and a stub driver names the target.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.launch import overlap_options

Job = tuple[str, str, tuple[Any, ...], dict[str, Any]]  # module, kernel name, argument types or values, keyword arguments

_SHARED_PER_SM = {75: 65536, 80: 167936, 89: 102400, 90: 233472, 100: 233472}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says of one kernel; error is its message where it gave up. programs_per_sm: by registers,
    shared memory, threads."""

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    programs_per_sm: int = 0
    seconds: float = 0.0
    error: str = ""


def compile_kernel(job: Job, capability: int) -> Any:
    """Triton's CompiledKernel for `job` on compute capability `capability` (90 = Hopper), without a GPU."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Stub:
        """The three questions Triton asks a driver while compiling."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int = 0) -> int:
            return 0

    module, name, args, kwargs = job
    driver.set_active(Stub())
    kernel = getattr(importlib.import_module(module), name)
    if "OVERLAP" in kernel.arg_names and "OVERLAP" not in kwargs:
        kwargs = kwargs | overlap_options(capability >= 90)
    return kernel.warmup(*args, grid=(1,), **kwargs)


def _resources(compiled: Any, capability: int, seconds: float) -> Compiled:
    import triton

    warps = compiled.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no register count: {report[:200]}")
    registers, stack = int(found[1]), int(found[2])
    shared = compiled.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = _SHARED_PER_SM.get(capability, 65536) // (shared + 1024)
    return Compiled(registers, stack, shared, min(by_registers, by_shared, 2048 // (32 * warps), 32), seconds)


def _compile_job(arguments: tuple[Job, int]) -> Compiled:
    import time

    job, capability = arguments
    started = time.perf_counter()
    try:
        compiled = compile_kernel(job, capability)
        return _resources(compiled, capability, time.perf_counter() - started)
    except Exception as error:  # one bad variant must not stop a sweep; its message is the result
        return Compiled(error=f"{type(error).__name__}: {error}"[-300:], seconds=time.perf_counter() - started)


def compile_ahead(jobs: Iterable[Job], capability: int, processes: int | None = None) -> list[Compiled]:
    """Compile all jobs on `processes` cores (default: all); results in the order of jobs."""
    work = [(job, capability) for job in jobs]
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        return pool.map(_compile_job, work, chunksize=1)
