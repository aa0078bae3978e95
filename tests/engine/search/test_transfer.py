"""Arrays to the device and a table back: the right values, whatever happens to the source right after the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.search.transfer import TableReader, copy_to_device, to_device

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


def test_a_reader_sees_what_the_table_holds_when_it_reads() -> None:
    table = torch.zeros((3, 2, 2), dtype=torch.int32)
    reader = TableReader(table)
    for value in (1, 2):
        table[1] = value
        assert reader.read(2).tolist() == [[[0, 0]] * 2, [[value] * 2] * 2]
        assert reader.read(1).tolist() == [[[0, 0]] * 2]


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


@pytest.mark.gpu
def test_a_reader_on_a_stream_of_its_own_waits_for_its_copies_alone(cuda: torch.device) -> None:
    """What is launched on the main stream meanwhile, here a write behind a long wait, is not waited for; later it shows."""
    table = torch.arange(30_000, dtype=torch.int32, device=cuda).view(100, 300)
    reader, stream = TableReader(table), torch.cuda.Stream()
    table.add_(0)  # a kernel's first launch loads its code, which waits for the whole device
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    table.add_(1)
    with torch.cuda.stream(stream):
        lines = reader.read(60)
    assert np.array_equal(lines, np.arange(18_000).reshape(60, 300))
    torch.cuda.synchronize()
    assert np.array_equal(reader.read(100), np.arange(1, 30_001).reshape(100, 300))
