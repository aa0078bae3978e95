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
from kernels.expert_checks import ExpertCase, check_expert_case, expert_cases, expert_inputs, pipelined_cases
from kernels.expert_gemm import (
    FfnTiles,
    PackedExperts,
    dequantize_reference,
    expert_ffn,
    expert_gemm,
    expert_gemm_reference,
    pack,
    select_tiles,
    unpack,
)
from kernels.expert_gemm.dequant import dequantize_ptx
from kernels.expert_gemm.hopper.launcher import check_pipelined, pipelined_constants
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.testing import random_experts, relative_error

CASES = expert_cases(large=False)
# fp16 differs from bf16 by its decoder alone: every third case meets each mode and precision
GPU_CASES = [(c, torch.bfloat16) for c in expert_cases(large=True)]
GPU_CASES += [(c, torch.float16) for c in expert_cases(large=True)[::3]]
PIPELINED_CASES = [(c, torch.bfloat16) for c in pipelined_cases()] + [(c, torch.float16) for c in pipelined_cases()[::2]]


def case_name(value: object) -> str:
    return value.name if isinstance(value, ExpertCase) else str(value)


@pytest.fixture(scope="module")
def compiled(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> None:
    cases = GPU_CASES + (PIPELINED_CASES if torch.cuda.get_device_capability() == (9, 0) else [])
    jobs: dict[str, Job] = {}
    for c, dtype in cases:
        p = c.precision
        for job in ffn_jobs(c.d_model, c.d_ff, c.top_k, p.bits, p.group_size, c.tiles, dtype):
            jobs[repr(job)] = job
    compile_first(list(jobs.values()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_interpreter_matches_fp64(case: ExpertCase, cpu: torch.device) -> None:
    dtype = torch.float16 if CASES.index(case) % 2 else torch.float32
    assert check_expert_case(case, cpu, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), GPU_CASES, ids=case_name)
@pytest.mark.usefixtures("compiled")
def test_gpu_matches_fp64(case: ExpertCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_expert_case(case, cuda, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), PIPELINED_CASES, ids=case_name)
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


def composition_is_invisible(device: torch.device, dtype: torch.dtype) -> bool:
    """The last five tokens alone give the bits they give among all, for every tile shape without a k split."""
    case = ExpertCase(23, 256, 512, 3, 2, PRECISIONS["w4a16"], FfnTiles(16, join=2))
    inputs = expert_inputs(case, device, dtype)
    whole = inputs.run(case.tiles)
    for tiles in (
        FfnTiles(16, join=4, fused=True, programs_per_sm=1),
        FfnTiles(32, bn1=128, join=1),
        FfnTiles(32, join=2, narrow=16),  # narrow for the few, wide for all of them
    ):
        from kernels.route import order_reference

        ids, gates = inputs.routing.expert_ids[-5:], inputs.routing.gate_weights[-5:]
        routing = order_reference(ids, gates, 3, 256, tiles.block_tokens)
        few = dataclasses.replace(inputs, x=inputs.x[-5:].contiguous(), routing=routing)
        active = ids >= 0
        if not torch.equal(few.run(tiles)[active], whole[-5:][active]):
            return False
    return True


def test_batch_composition_does_not_change_bits(cpu: torch.device) -> None:
    # numpy picks its summation order by shape, so the interpreter can only show equality to rounding for other tiles
    case = ExpertCase(23, 256, 512, 3, 2, PRECISIONS["w4a16"], FfnTiles(16, join=2))
    inputs = expert_inputs(case, cpu, torch.float32)
    first = inputs.run(case.tiles)
    x = inputs.x.clone()
    x[0] = 1e3  # a batch mate changes
    second = dataclasses.replace(inputs, x=x).run(case.tiles)
    active = inputs.routing.expert_ids[1:] >= 0
    assert torch.equal(first[1:][active], second[1:][active])


@pytest.mark.gpu
def test_gpu_batch_composition_does_not_change_bits(cuda: torch.device) -> None:
    assert composition_is_invisible(cuda, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [FfnTiles(16, join=2), FfnTiles(16, join=2, fused=True, dynamic=True, split=2)])
def test_gpu_graph_replays_with_changing_inputs(tiles: FfnTiles, cuda: torch.device) -> None:
    from kernels.route import route
    from kernels.route.launcher import semaphores

    case = ExpertCase(40, 256, 512, 8, 2, PRECISIONS["w4a16"], tiles)
    inputs = expert_inputs(case, cuda, torch.bfloat16)
    router = torch.randn(8, 256, device=cuda)
    x = torch.empty(40, 256, device=cuda, dtype=torch.bfloat16)
    counters = semaphores(40, cuda)

    def step() -> torch.Tensor:
        routing = route(x, router, top_k=2, block_tokens=16, semaphores=counters)
        return expert_ffn(x, inputs.fc1, inputs.bias1, inputs.fc2, inputs.bias2, routing, tiles=tiles)

    x.normal_()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    before = torch.cuda.memory_allocated()
    for seed in range(50):
        x.copy_(torch.randn(40, 256, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        got = captured.clone()
        assert torch.equal(got, step())
    assert torch.cuda.memory_allocated() <= before + 2 * captured.numel() * captured.element_size()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 256), (70, 300), (129, 511)])
def test_pack_round_trip(bits: int, group: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (3, n, k), dtype=torch.int8, generator=generator)
    scales = torch.rand((3, n, -(-k // group)) if group else (3, n), generator=generator)
    back, back_scales = unpack(pack(codes, scales, bits, group))
    assert torch.equal(back, codes)
    assert torch.equal(back_scales, scales)


def test_packed_words_are_the_documented_layout() -> None:
    codes = torch.zeros(1, 64, 256, dtype=torch.int8)
    codes[0, 5, 3 * 32 + 2 * 7 + 1] = 7  # plane 3, pair 7, side 1: word 14, high half, nibble 3
    codes[0, 5, 6 * 32 + 2 * 7] = -8  # plane 6: word 15, low half, nibble 2
    words = pack(codes, torch.ones(1, 64), 4).data[0, 0, 0, 5].long() & 0xFFFFFFFF
    zero = 0x88888888
    assert words[14] == zero ^ (0x8 << 28) ^ (0xF << 28)
    assert words[15] == zero ^ (0x8 << 8)
    assert sum(int(w) != zero for w in words) == 2


def test_dequantized_matrix_is_code_times_group_scale() -> None:
    codes = torch.full((1, 64, 256), 3, dtype=torch.int8)
    scales = torch.arange(1.0, 129.0).view(1, 64, 2)
    matrix = dequantize_reference(pack(codes, scales, 4, 128))
    assert matrix[0, 10, 127] == 3 * 21
    assert matrix[0, 10, 128] == 3 * 22


def test_wrong_layout_version_names_the_fix() -> None:
    packed = pack(torch.zeros(1, 64, 256, dtype=torch.int8), torch.ones(1, 64), 4)
    with pytest.raises(ValueError, match="convert again"):
        PackedExperts(packed.data, packed.scales, 4, 0, 64, 256, layout_version=99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 255)}, "routing and weight want"),
        ({"bias1": torch.zeros(3, 5)}, r"must be \[E, N\]"),
        ({"fc2": None}, "fc2 must be"),
    ],
)
def test_mismatched_operands_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    case = ExpertCase(7, 256, 512, 3, 2, PRECISIONS["w8a16"], FfnTiles(16, join=2))
    inputs = expert_inputs(case, torch.device("cpu"), torch.float32)
    if "fc2" in change:
        change = {"fc2": inputs.fc1}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(inputs, **change).run(case.tiles)


def test_tiles_of_another_size_than_the_routing_are_refused() -> None:
    case = ExpertCase(7, 256, 512, 3, 2, PRECISIONS["w8a16"], FfnTiles(16, join=2))
    inputs = expert_inputs(case, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="routing was cut to 16"):
        inputs.run(FfnTiles(32, join=2))


def test_single_gemms_match_their_twin(cpu: torch.device) -> None:
    case = ExpertCase(9, 256, 256, 3, 2, PRECISIONS["w4a16-g128"], FfnTiles(16, join=4))
    inputs = expert_inputs(case, cpu, torch.float32)
    x = torch.nan_to_num(inputs.x)
    used = int(inputs.routing.expert_offsets[-1])
    hidden = expert_gemm(x, inputs.fc1, inputs.bias1, inputs.routing, first=True, tiles=case.tiles)
    truth = expert_gemm_reference(x, inputs.fc1, inputs.bias1, inputs.routing, first=True)
    assert relative_error(hidden[:used], truth[:used]) < 2e-6
    assert (truth[:used] >= 0).all()


def words_of(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of packed words [n, 2] that hold every code in every place, and their codes [n, 64 / bits, 2]: plane, side."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (1, 64, 4096), dtype=torch.int8, generator=generator)
    words = pack(codes, torch.ones(1, 64), bits).data.view(64 * 4096 * bits // 32 // 2, 2)
    block = 1024 // bits
    # [strip, row, block, plane, pair, side] -> [strip, block, row, pair, plane, side]
    planes = codes.view(1, 64, 4096 // block, block // 32, 16, 2).permute(0, 2, 1, 4, 3, 5)
    return words, planes.reshape(-1, block // 32, 2)


def run_ptx(assembly: str, words: torch.Tensor, outputs: int, float_dtype: torch.dtype) -> list[torch.Tensor]:
    """Interpret the few instructions that the decoders use on every pair of words; each result as two floats [n, 2]."""
    names = {f"${outputs + i}": words[:, i].long() & 0xFFFFFFFF for i in range(2)}

    def value(name: str) -> torch.Tensor:
        return torch.tensor(int(name, 0)) if name[0].isdigit() else names[name]

    def floats(name: str) -> torch.Tensor:
        bits = torch.stack((value(name) & 0xFFFF, value(name) >> 16), dim=-1)
        return bits.to(torch.uint16).view(float_dtype).double()

    for line in assembly.splitlines()[2:-1]:  # without braces and declarations
        operation, rest = line.rstrip(";").split(" ", 1)
        out, *arguments = (part.strip() for part in rest.split(","))
        if operation == "mov.b32":
            names[out] = value(arguments[0])
        elif operation == "shr.u32":
            names[out] = value(arguments[0]) >> int(arguments[1])
        elif operation == "lop3.b32":
            a, b, c = (value(name) for name in arguments[:3])
            names[out] = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}[int(arguments[3], 0)]
        else:
            a, b = floats(arguments[0]), floats(arguments[1])
            exact = a + b if operation.startswith("add") else a * b + floats(arguments[2])
            rounded = exact.to(float_dtype).view(torch.uint16).long()
            names[out] = rounded[..., 0] | rounded[..., 1] << 16
    return [floats(f"${i}") for i in range(outputs)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("half", [0, 1])
def test_assembly_decodes_every_code_of_every_plane(bits: int, dtype: str, half: int) -> None:
    words, codes = words_of(bits)
    float_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    per_half = 16 // bits
    for first in range(0, per_half, 2):
        assembly, constraints = dequantize_ptx(bits, dtype, half, first, 2)
        assert constraints == "=&r,=&r,r,r"
        for i, plane in enumerate(run_ptx(assembly, words, 2, float_dtype)):
            assert torch.equal(plane, codes[:, half * per_half + first + i].double())
    assembly, _ = dequantize_ptx(bits, dtype, half)
    for p, plane in enumerate(run_ptx(assembly, words, per_half, float_dtype)):
        assert torch.equal(plane, codes[:, half * per_half + p].double())


def test_the_pipelined_kernel_compiles_for_hopper_and_keeps_a_dot_in_flight() -> None:
    """In a process of its own: here triton.jit means the interpreter. Where ptxas waits after every dot, it says so."""
    code = r"""
import re, subprocess, tempfile, triton
from pathlib import Path
from kernels.compile_ahead import compile_kernel
from kernels.expert_gemm import FfnTiles
from kernels.expert_gemm.jobs import ffn_jobs
for tiles in (
    FfnTiles(64, 128, 128, stages=2, programs_per_sm=2, pipelined=True),
    FfnTiles(32, 128, 64, stages=2, programs_per_sm=3, pipelined=True),
    FfnTiles(32, 128, 128, stages=3, programs_per_sm=2, pipelined=True, x_stages=3),
):
    ptx = compile_kernel(ffn_jobs(1024, 2048, 2, 4, 0, tiles)[0], 90).asm["ptx"]
    assert "1" in re.findall(r"wgmma.wait_group.sync.aligned (\d+)", ptx), "every dot is waited for"
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


@pytest.mark.parametrize(
    "fields",
    [{"block_tokens": 16, "narrow": 8}, {"block_tokens": 64, "narrow": 16}, {"narrow": 16, "fused": True}],
    ids=str,
)
def test_narrow_is_half_of_a_tile_that_can_be_halved(fields: dict[str, int]) -> None:
    good = {"block_tokens": 32, "narrow": 16}
    FfnTiles(**good)
    with pytest.raises(ValueError, match="narrow is"):
        FfnTiles(**good | fields)


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
