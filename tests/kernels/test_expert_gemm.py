import dataclasses

import pytest
import torch

from kernels.cases import PRECISIONS
from kernels.checks import LIMITS, ExpertCase, check_expert_case, expert_cases, expert_inputs
from kernels.expert_gemm import (
    FfnTiles,
    PackedExperts,
    dequantize_reference,
    expert_ffn,
    expert_gemm,
    expert_gemm_reference,
    pack,
    unpack,
)
from kernels.testing import relative_error

CASES = expert_cases(large=False)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_interpreter_matches_fp64(case: ExpertCase, cpu: torch.device) -> None:
    dtype = torch.float16 if CASES.index(case) % 2 else torch.float32
    assert check_expert_case(case, cpu, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", expert_cases(large=True), ids=lambda c: c.name)
def test_gpu_matches_fp64(case: ExpertCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_expert_case(case, cuda, dtype) <= LIMITS[dtype]


def composition_is_invisible(device: torch.device, dtype: torch.dtype) -> bool:
    """The last five tokens alone give the bits they give among all, for every tile shape without a k split."""
    case = ExpertCase(23, 256, 512, 3, 2, PRECISIONS["w4a16"], FfnTiles(16, join=2))
    inputs = expert_inputs(case, device, dtype)
    whole = inputs.run(case.tiles)
    for tiles in (FfnTiles(16, join=4, fused=True, programs_per_sm=1), FfnTiles(32, bn1=128, join=1)):
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
