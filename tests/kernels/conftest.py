"""Kernel tests: Triton's interpreter where there is no GPU (tests/conftest.py turns it on), else bf16 and assembly."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.compile_ahead import Job


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU; here the gpu marker covers the same cases")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def compile_first(cuda: torch.device) -> Callable[[list[Job]], None]:
    """Compiles kernels on all cores before the tests that launch them, where one after the other would take minutes."""

    def compile_all(jobs: list[Job]) -> None:
        # in a process of its own, since the pool forks and this one holds CUDA; a job that fails here fails in its test
        code = (
            "import pickle, sys; from kernels.compile_ahead import compile_ahead; "
            "compile_ahead(*pickle.load(sys.stdin.buffer))"
        )
        major, minor = torch.cuda.get_device_capability(cuda)
        work = pickle.dumps((jobs, 10 * major + minor))
        subprocess.run([sys.executable, "-c", code], input=work, cwd=Path(__file__).parents[2], check=True)

    return compile_all
