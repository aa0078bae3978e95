"""Which weights a launch asks for in L2 for the one behind it."""

import os
import re
import subprocess
import sys

import pytest
import torch

from kernels.expert_gemm import FfnTiles, PackedExperts, first_weights
from kernels.expert_gemm.hopper.launcher import first_strips
from kernels.expert_gemm.packing import packed_shape
from kernels.linear_checks import LinearCase, linear_inputs
from kernels.row_statistics import RowStatistics
from kernels.small_linear import LinearTiles, small_linear
from kernels.weights_ahead import WeightsAhead, ahead_constants

TILES = FfnTiles(block_tokens=32, bn1=128, bn2=128, warps=4, stages=3, x_stages=3, programs_per_sm=2, pipelined=True)

LINEAR = LinearTiles(64, 128, 64, stages=5, prefetch=True, overlap=True, specialized=True)


def experts(count: int, features: int, inputs: int, bits: int) -> PackedExperts:
    """Packed zeros."""
    data = torch.zeros(packed_shape(count, features, inputs, bits), dtype=torch.int32)
    return PackedExperts(data, torch.ones(count, features), bits, 0, features, inputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_first_steps_of_the_strips_that_all_programs_begin_with(bits: int) -> None:
    fc1 = experts(8, 512, 1024, bits)
    asked = first_strips(fc1, TILES, 12, 1 << 20)
    assert asked is not None
    assert asked.weights is fc1.data
    assert (asked.pieces, asked.size) == (24, 2 * 8192)
    assert asked.stride == fc1.data[0, 0].numel() * 4
    words = fc1.data.view(-1)
    for piece in range(asked.pieces):  # the items 0 to 11 are two strips each, those of a tile one behind the other
        words[piece * asked.stride // 4 : (piece * asked.stride + asked.size) // 4] = 1
    assert bool((fc1.data[:3, :, :2] == 1).all())
    assert int(fc1.data.sum()) == asked.pieces * asked.size // 4


def test_no_more_than_there_is() -> None:
    fc1 = experts(2, 256, 256, 4)
    asked = first_strips(fc1, TILES, 264, 1 << 20)
    assert asked is not None
    assert (asked.pieces, asked.size, asked.stride) == (8, 8192, 8192)
    limited = first_strips(fc1, TILES, 264, 3 * 8192 + 8191)
    assert limited is not None
    assert (limited.pieces, limited.size, limited.stride) == (3, 8192, 8192)
    assert first_strips(fc1, TILES, 264, 8191) is None, "less than a piece"


def test_other_launches_and_devices_ask_for_nothing() -> None:
    fc1 = experts(2, 256, 256, 4)
    assert first_weights(fc1, TILES, 1 << 20) is None
    assert first_weights(fc1, FfnTiles(block_tokens=16), 1 << 20) is None
    assert ahead_constants(None)["PIECES"] == 0


def test_pieces_that_cannot_be_asked_for_are_refused() -> None:
    weights = torch.zeros(64, dtype=torch.int32)
    assert ahead_constants(WeightsAhead(weights, 4, 64, 64)) == {"PIECES": 4, "SIZE": 64, "STRIDE": 64}
    for pieces, size, stride in ((5, 64, 64), (0, 64, 64), (4, 80, 64)):
        with pytest.raises(ValueError, match="do not lie within"):
            WeightsAhead(weights, pieces, size, stride)
    for size, stride in ((8, 64), (64, 72), (0, 64)):
        with pytest.raises(ValueError, match="multiples of 16"):
            WeightsAhead(weights, 1, size, stride)


def test_a_whole_matrix_or_nothing() -> None:
    matrix = torch.zeros(96, 1024, dtype=torch.bfloat16)
    asked = WeightsAhead.whole(matrix, 1 << 20)
    assert asked is not None
    assert (asked.pieces, asked.size, asked.stride) == (12, 16384, 16384)
    assert asked.pieces * asked.size == matrix.numel() * 2
    assert WeightsAhead.whole(matrix, 96 * 2048 - 1) is None
    assert WeightsAhead.whole(matrix[:3], 1 << 20) is None, "not whole pieces"


COMPILE = """
import torch
from kernels.compile_ahead import compile_kernel
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import linear_jobs
from kernels.weights_ahead import WeightsAhead
tiles = LinearTiles(64, 128, 64, stages=5, prefetch=False, overlap=True, specialized=True)
for ahead in (None, WeightsAhead(torch.zeros(4096, dtype=torch.int32), 3, 4096, 5120)):
    job = linear_jobs(1024, 1024, tiles, torch.bfloat16, mode=1, hopper=True, chunks=True, ahead=ahead)[0]
    print("KERNEL", compile_kernel(job, 90).asm["ptx"])
"""


def test_a_map_asks_behind_its_own_copies() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=True)
    plain, asking = found.stdout.split("KERNEL")[1:]
    assert "cp.async.bulk.prefetch" not in plain
    asks = [match.start() for match in re.finditer(r"cp\.async\.bulk\.prefetch\.L2\.global", asking)]
    copies = [match.start() for match in re.finditer(r"cp\.async\.bulk\.tensor", asking)]
    assert asks, "it asks for nothing"
    assert min(asks) > max(copies)
    assert re.search(r"mul\S* .*, 5120;|mad\S* .*, 5120, ", asking), "pieces are not a stride apart"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 64, 200])
def test_what_is_asked_for_changes_no_bit(rows: int, cuda: torch.device) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.x")
    inputs = linear_inputs(LinearCase(rows, 1024, 1024, residual=True), cuda, torch.bfloat16)
    assert inputs.residual is not None
    others = torch.ones(1 << 20, dtype=torch.int32, device=cuda)
    found = []
    for ahead in (None, WeightsAhead(others, 128, 16384, 32768)):
        statistics = RowStatistics.allocate(rows, 1024, cuda)
        out = inputs.residual.clone()
        small_linear(inputs.x, inputs.weight, inputs.bias, residual=out, tiles=LINEAR, statistics=statistics, ahead=ahead)
        assert statistics.valid
        found.append((out, statistics.chunks[:rows].clone()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert bool((others == 1).all())
