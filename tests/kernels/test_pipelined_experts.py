"""The launch for many tokens, on Hopper alone: right on a GPU, fit to be compiled without one, refused elsewhere."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.cases import PRECISIONS
from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.expert_checks import ExpertCase, check_expert_case, expert_case_jobs, expert_inputs, pipelined_cases
from kernels.expert_gemm import FfnTiles, expert_ffn_reference, expert_gemm, select_tiles
from kernels.expert_gemm.hopper.launcher import check_pipelined, pipelined_constants
from kernels.testing import random_experts, relative_error

CASES = [(c, torch.bfloat16) for c in pipelined_cases()] + [(c, torch.float16) for c in pipelined_cases()[::2]]


def case_name(value: object) -> str:
    return value.name if isinstance(value, ExpertCase) else str(value)


@pytest.fixture(scope="module")
def compiled(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        compile_first([job for case, dtype in CASES for job in expert_case_jobs(case, dtype)])


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=case_name)
@pytest.mark.usefixtures("compiled")
def test_gpu_pipelined_launch_matches_fp64(case: ExpertCase, dtype: torch.dtype, cuda: torch.device) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    assert check_expert_case(case, cuda, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
def test_gpu_pipelined_bits_do_not_depend_on_the_batch(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kernels.route import order_reference

    case = ExpertCase(200, 1024, 2048, 3, 2, PRECISIONS["w4a16"], FfnTiles(64, 128, 64, stages=2, pipelined=True))
    inputs = expert_inputs(case, cuda, torch.bfloat16)
    whole = inputs.run(case.tiles)
    ids, gates = inputs.routing.expert_ids[-70:], inputs.routing.gate_weights[-70:]
    few = dataclasses.replace(
        inputs, x=inputs.x[-70:].contiguous(), routing=order_reference(ids, gates, 3, case.d_model, case.tiles.block_tokens)
    )
    assert torch.equal(few.run(case.tiles)[ids >= 0], whole[-70:][ids >= 0])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tiles", [33, 34, 37, 42, 67])
def test_gpu_programs_with_one_item_more_change_no_bits(num_tiles: int, cuda: torch.device) -> None:
    """Each expert has one tile, so two programs a multiprocessor have few items over full rounds; one program has others."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kernels.route import order_reference

    tiles = FfnTiles(32, 128, 128, stages=3, programs_per_sm=2, pipelined=True, x_stages=3)
    case = ExpertCase(num_tiles * 9, 1024, 2048, num_tiles, 1, PRECISIONS["w4a16"], tiles, "one")
    inputs = expert_inputs(case, cuda, torch.bfloat16)
    ids = (torch.arange(case.num_tokens, dtype=torch.int32, device=cuda) % num_tiles)[:, None]
    routing = order_reference(ids, inputs.routing.gate_weights, num_tiles, case.d_model, tiles.block_tokens)
    assert int(routing.num_tiles) == num_tiles
    inputs = dataclasses.replace(inputs, routing=routing)
    out = inputs.run(tiles)
    truth = expert_ffn_reference(inputs.x, inputs.fc1, inputs.bias1, inputs.fc2, inputs.bias2, routing, dtype=torch.float64)
    assert relative_error(out, truth) <= LIMITS[torch.bfloat16]
    for other in (tiles, tiles, dataclasses.replace(tiles, programs_per_sm=1)):
        assert torch.equal(inputs.run(other), out)


def test_the_pipelined_kernel_compiles_for_hopper_and_keeps_a_dot_in_flight() -> None:
    """In a process of its own: here triton.jit means the interpreter. Where ptxas waits after every dot, it says so."""
    code = r"""
import re, subprocess, tempfile, triton
from pathlib import Path
from kernels.compile_ahead import compile_kernel
from kernels.expert_gemm import FfnTiles
from kernels.expert_gemm.jobs import ffn_jobs
for tiles, in_flight in (
    (FfnTiles(64, 128, 128, stages=2, programs_per_sm=2, pipelined=True), "1"),
    (FfnTiles(32, 128, 64, stages=2, programs_per_sm=3, pipelined=True), "1"),
    (FfnTiles(32, 128, 128, stages=3, programs_per_sm=2, pipelined=True, x_stages=3), "2"),  # dots in pairs
):
    ptx = compile_kernel(ffn_jobs(1024, 2048, 2, 4, 0, tiles)[0], 90).asm["ptx"]
    waits = re.findall(r"wgmma.wait_group.sync.aligned (\d+)", ptx)
    assert in_flight in waits and in_flight == max(waits), waits
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [ptxas, "-v", "--gpu-name=sm_90a", file, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in said and "spill" in said and " 0 bytes spill stores" in said, said
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    assert registers * 128 * tiles.programs_per_sm <= 65536, registers  # all programs must be resident
"""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 16}, "takes int4 or int8"),
        ({"group": 64}, "per-channel scales"),
        ({"dtype": torch.float32}, "takes bf16 or fp16"),
        ({"d_ff": 320}, "must be multiples of the tiles"),
        ({"d_model": 192}, "must be multiples of 256"),
        ({"d_model": 256}, "2 steps of 256 input features are held"),
        ({"bits": 8, "x_stages": 1}, "choose 2 or more"),
        ({"num_pairs": 2**22}, "split the batch"),
    ],
)
def test_pipelined_launch_refuses_what_it_cannot_serve(change: dict[str, int], message: str) -> None:
    p = {
        "bits": 4,
        "group": 0,
        "d_model": 512,
        "d_ff": 512,
        "num_pairs": 64,
        "x_stages": 2,
        "dtype": torch.bfloat16,
    } | change
    tiles = FfnTiles(64, 128, 64, stages=2, pipelined=True, x_stages=p["x_stages"])
    generator = torch.Generator().manual_seed(0)
    fc1 = random_experts(2, p["d_ff"], p["d_model"], p["bits"], p["group"], torch.bfloat16, generator)
    with pytest.raises(ValueError, match=message):
        check_pipelined(fc1, p["dtype"], p["num_pairs"], tiles)


def test_registers_of_a_pipelined_launch_leave_room_for_its_programs() -> None:
    def registers(**fields: int) -> int:
        tiles = FfnTiles(32, 128, 128, stages=2, pipelined=True, **fields)
        return pipelined_constants(512, 512, 2, 4, tiles)["maxnreg"]

    assert [registers(programs_per_sm=p) for p in (1, 2, 3, 4)] == [255, 255, 168, 128]
    assert registers(programs_per_sm=2, warps=8) == 128
    assert registers(programs_per_sm=2, max_registers=200) == 200


@pytest.mark.parametrize(
    "fields",
    [{"bn1": 64, "warps": 8}, {"block_tokens": 16}, {"stages": 1}, {"x_stages": 0}, {"x_stages": 3}, {"bn2": 256}],
    ids=str,
)
def test_pipelined_tiles_must_fit_the_warps(fields: dict[str, int]) -> None:
    good = {"block_tokens": 64, "bn1": 128, "bn2": 64, "stages": 2}
    FfnTiles(**good, pipelined=True)
    with pytest.raises(ValueError, match="pipelined"):
        FfnTiles(**good | fields, pipelined=True)


def test_pipelined_tiles_are_refused_where_there_is_no_hopper_and_for_one_gemm(cpu: torch.device) -> None:
    tiles = FfnTiles(64, 128, 64, stages=2, pipelined=True)
    case = ExpertCase(7, 512, 512, 3, 2, PRECISIONS["w4a16"], tiles)
    inputs = expert_inputs(case, cpu, torch.float16)
    with pytest.raises(ValueError, match=r"compute capability 9\.0"):
        inputs.run(tiles)
    with pytest.raises(ValueError, match="call expert_ffn"):
        expert_gemm(inputs.x, inputs.fc1, inputs.bias1, inputs.routing, first=True, tiles=tiles)


def test_group_scales_never_get_the_pipelined_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(op: str, device: torch.device, *, shape: dict[str, int], size: int) -> dict[str, int | bool] | None:
        return None if shape["group"] else {"block_tokens": 64, "bn1": 128, "bn2": 64, "stages": 2, "pipelined": True}

    monkeypatch.setattr("kernels.expert_gemm.tiles.measured_choice", stored)
    generator = torch.Generator().manual_seed(0)
    plain, grouped = (random_experts(2, 512, 512, 4, group, torch.bfloat16, generator) for group in (0, 128))
    assert select_tiles(4096, plain).pipelined
    assert not select_tiles(4096, grouped).pipelined
