import pytest
import torch

from kernels.route import FEW_TOKENS, GateTiles, order_reference, route, route_reference, semaphores
from kernels.route.tiles import default_tiles
from kernels.route_checks import ROUTE_SIZES, check_route
from kernels.routing import max_tiles

TILES = (  # of D = 96: an empty last part; one step for each program; all of D in one program; experts in parts
    GateTiles(features=32, split=4),
    GateTiles(features=16, split=6, expert_parts=2),
    GateTiles(tokens=32, features=64, split=1),
    GateTiles(features=128, split=1, expert_parts=4),
    GateTiles(tokens=64, features=32, split=3, warps=8),
)


@pytest.mark.parametrize("sizes", ROUTE_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_interpreter_matches_reference(sizes: tuple[int, int, int, int], dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_route(*sizes, cpu, dtype) == ""


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("num_experts", [5, 64])
def test_every_cut_of_the_gate_gives_the_reference(tiles: GateTiles, num_experts: int, cpu: torch.device) -> None:
    assert check_route(35, 96, num_experts, 2, cpu, torch.float32, tiles=tiles) == ""


@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS])
def test_few_tokens_may_take_the_way_of_many(num_tokens: int, cpu: torch.device) -> None:
    assert check_route(num_tokens, 64, 6, 2, cpu, torch.float32, fixed=True) == ""


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS, 33])
def test_experts_with_several_tiles(num_tokens: int, cpu: torch.device) -> None:
    assert check_route(num_tokens, 32, 2, 1, cpu, torch.float32, block_tokens=4) == ""


def test_pairs_of_several_chunks(cpu: torch.device) -> None:
    assert check_route(1100, 16, 3, 2, cpu, torch.float32) == ""  # 2200 pairs: more than one chunk of 2048


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    (*ROUTE_SIZES, (1, 1024, 32, 2), (16, 2048, 128, 2), (320, 1024, 32, 1), (320, 2048, 128, 2), (4096, 2048, 128, 2)),
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_matches_reference(sizes: tuple[int, int, int, int], dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_route(*sizes, cuda, dtype) == ""


@pytest.mark.parametrize("top_k", [1, 2])
def test_ties_go_to_the_lowest_expert(top_k: int, cpu: torch.device) -> None:
    x, weight = torch.ones(3, 32), torch.ones(7, 32)
    out = route(x, weight, top_k=top_k, block_tokens=16, semaphores=semaphores(3, cpu))
    assert out.expert_ids.tolist() == [list(range(top_k))] * 3


def test_first_choice_is_taken_after_the_cast_and_second_from_raw_logits(cpu: torch.device) -> None:
    # In fp16 the two largest probabilities round to the same value: expert 0 wins the tie though expert 2's logit is larger.
    weight = torch.tensor([[1.0, 0.0], [-4.0, 0.0], [1.0, 1.0]])
    x = torch.tensor([[1.0, 1e-4]], dtype=torch.float16)
    truth = route_reference(x, weight, top_k=2, block_tokens=16)
    assert truth.expert_ids.tolist() == [[0, 2]]
    out = route(x, weight, top_k=2, block_tokens=16, semaphores=semaphores(1, cpu))
    assert out.expert_ids.tolist() == [[0, 2]]


def test_all_inactive_gives_no_tile(cpu: torch.device) -> None:
    out = route(
        torch.randn(5, 32),
        torch.randn(4, 32),
        top_k=2,
        block_tokens=16,
        semaphores=semaphores(5, cpu),
        active=torch.zeros(5, dtype=torch.bool),
    )
    assert int(out.num_tiles) == 0
    assert out.expert_ids.eq(-1).all()
    assert out.gate_weights.eq(0).all()
    assert out.scatter_index.eq(-1).all()


def test_a_row_does_not_depend_on_its_batch(cpu: torch.device) -> None:
    x, weight = torch.randn(40, 64), torch.randn(6, 64)
    many = route(x, weight, top_k=2, block_tokens=16, semaphores=semaphores(40, cpu))
    x[:20] = 9.0
    again = route(x, weight, top_k=2, block_tokens=16, semaphores=semaphores(40, cpu))
    assert torch.equal(many.gate_weights[20:], again.gate_weights[20:])
    alone = route(x[25:26], weight, top_k=2, block_tokens=16, semaphores=semaphores(40, cpu), fixed=True)
    assert torch.equal(many.gate_weights[25:26], alone.gate_weights)


@pytest.mark.parametrize(("d_model", "num_experts"), [(16, 2), (64, 8), (1024, 32), (2048, 128), (96, 4096), (1000, 33)])
def test_default_tiles_cover_everything(d_model: int, num_experts: int) -> None:
    tiles = default_tiles(d_model, num_experts)
    steps = -(-d_model // (tiles.features * tiles.split))
    assert (tiles.split - 1) * steps * tiles.features < d_model  # no part is empty
    assert num_experts / tiles.expert_parts <= 32 or tiles.expert_parts == 8


def test_no_tokens(cpu: torch.device) -> None:
    out = route(torch.empty(0, 32), torch.randn(4, 32), top_k=2, block_tokens=16, semaphores=semaphores(1, cpu))
    assert int(out.num_tiles) == 0


@pytest.mark.parametrize(("pairs", "experts", "block"), [(1, 4, 16), (64, 3, 16), (65, 64, 16), (640, 128, 32)])
def test_max_tiles_bounds_the_worst_routing(pairs: int, experts: int, block: int) -> None:
    # Worst case: every expert hit by one pair, the rest on the first.
    hit = min(pairs, experts)
    ids = torch.cat((torch.arange(hit), torch.zeros(pairs - hit, dtype=torch.long)))[:, None].int()
    routing = order_reference(ids, torch.ones(pairs, 1), experts, 64, block)
    assert int(routing.num_tiles) <= max_tiles(pairs, experts, block)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 3}, "choose 1 or 2"),
        ({"router_weight": torch.zeros(4, 31)}, r"x wants \[E, 32\]"),
        ({"semaphores": torch.zeros(1, dtype=torch.int32)}, "semaphores are for 16 tokens"),
    ],
)
def test_bad_input_is_refused(kwargs: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "router_weight": torch.zeros(4, 32),
        "top_k": 2,
        "block_tokens": 16,
        "semaphores": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(20, 32), **(good | kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"tokens": 8}, {"features": 48}, {"split": 17}, {"expert_parts": 3}])
def test_tiles_that_no_kernel_takes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="choose"):
        GateTiles(**wrong)
