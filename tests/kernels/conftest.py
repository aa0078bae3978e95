"""Kernel tests: Triton's interpreter where there is no GPU (tests/conftest.py turns it on), else bf16 and assembly."""

import pytest
import torch


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
