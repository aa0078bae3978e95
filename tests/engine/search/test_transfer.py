"""Arrays to the device: the right values, whatever happens to the source right after the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.search.transfer import copy_to_device, to_device

SMALL, LARGE = (5, 40), (5, 8192)  # bytes: below and above what the driver takes into its own buffer at once
CYCLES = 1_000_000_000  # of a GPU's clock, half a second: so long the stream is busy when a copy is asked for


def numbers(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(-(2**31), 2**31, shape).astype(np.int32)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_arrays_arrive_on_the_cpu(shape: tuple[int, ...]) -> None:
    array, buffer = numbers(shape), torch.zeros(shape, dtype=torch.int32)
    copy_to_device(buffer, array)
    arrived = to_device(array, torch.device("cpu"))
    assert torch.equal(buffer, torch.from_numpy(array))
    assert torch.equal(arrived, buffer)
    array.fill(7)
    assert not (buffer == 7).all(), "a buffer of fixed address must hold a copy"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("into_buffer", [True, False])
def test_a_source_may_change_while_the_copy_waits(shape: tuple[int, ...], into_buffer: bool, cuda: torch.device) -> None:
    """The stream is busy, so the copy runs long after the call has come back; several are under way at once."""
    buffers, sources = [], [numbers(shape) + i for i in range(4)]
    truth = [torch.from_numpy(source.copy()) for source in sources]
    targets = [torch.zeros(shape, dtype=torch.int32, device=cuda) for _ in sources]
    torch.cuda._sleep(CYCLES)
    for source, target in zip(sources, targets, strict=True):
        if into_buffer:
            copy_to_device(target, source)
        buffers.append(target if into_buffer else to_device(source, cuda))
        source.fill(-1)
    torch.cuda.synchronize()
    for buffer, expected in zip(buffers, truth, strict=True):
        assert torch.equal(buffer.cpu(), expected)
