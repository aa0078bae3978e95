import dataclasses
from collections.abc import Callable

import pytest
import torch

from kernels.cases import PRECISIONS
from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.expert_checks import ExpertCase, check_expert_case, expert_case_jobs, expert_cases, expert_inputs
from kernels.expert_gemm import FfnTiles, expert_ffn, expert_gemm, expert_gemm_reference
from kernels.testing import relative_error

CASES = expert_cases(large=False)
# fp16 differs from bf16 by its decoder alone: every third case meets each mode and precision
GPU_CASES = [(c, torch.bfloat16) for c in expert_cases(large=True)]
GPU_CASES += [(c, torch.float16) for c in expert_cases(large=True)[::3]]


def case_name(value: object) -> str:
    return value.name if isinstance(value, ExpertCase) else str(value)


@pytest.fixture(scope="module")
def compiled(compile_first: Callable[[list[Job]], None]) -> None:
    jobs = {repr(job): job for case, dtype in GPU_CASES for job in expert_case_jobs(case, dtype)}
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


def test_a_hidden_layer_of_another_dtype_is_refused() -> None:
    case = ExpertCase(7, 256, 512, 3, 2, PRECISIONS["w8a16"], FfnTiles(16, join=2))
    inputs = expert_inputs(case, torch.device("cpu"), torch.float32)
    operands = (inputs.x, inputs.fc1, inputs.bias1, inputs.fc2, inputs.bias2, inputs.routing)
    with pytest.raises(ValueError, match="in one dtype"):
        expert_ffn(*operands, tiles=case.tiles, hidden=torch.zeros(14, 512, dtype=torch.float16))


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
