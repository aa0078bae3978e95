import pytest
import torch

from kernels.head_checks import HEAD_LIMIT, HOPPER_HEADS, LARGE_HEADS, SMALL_HEADS, HeadCase, check_head_case, large_heads
from kernels.head_topk import HeadTiles, TopTokens, fixed_tiles, head_topk, head_topk_reference
from kernels.int8_linear import Int8Linear, quantize_int8

TILES = HeadTiles(16, 16, block_features=16)
GATED = HeadTiles(16, 16, block_features=16, gated=True)
EVERYWHERE = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on machines without a GPU")


def assert_same_tokens(out: TopTokens, truth: TopTokens) -> None:
    """For logits that are exact in any order of summation: ties must fall the same way."""
    assert out.token_ids.tolist() == truth.token_ids.tolist()
    torch.testing.assert_close(out.values, truth.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.log_sum_exp, truth.log_sum_exp, rtol=0, atol=1e-5)


def one_hot(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight whose logits are these [R, V], exactly."""
    return torch.eye(len(logits), 16, device=logits.device), torch.nn.functional.pad(
        logits.T, (0, 16 - len(logits))
    ).contiguous()


@pytest.mark.parametrize("case", SMALL_HEADS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreter_matches_fp64(case: HeadCase, dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_head_case(case, cpu, dtype) <= HEAD_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("case", (*SMALL_HEADS, *LARGE_HEADS, *HOPPER_HEADS), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_matches_fp64(case: HeadCase, dtype: torch.dtype, cuda: torch.device) -> None:
    if dtype == torch.float32 and case.tiles is not None and case.tiles.block_vocab > 64:
        pytest.skip("fp32 doubles the shared memory; it runs with its default tiles")
    if case in HOPPER_HEADS and case not in large_heads(cuda, dtype):
        pytest.skip("a kernel for Hopper")
    assert check_head_case(case, cuda, dtype) <= HEAD_LIMIT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reference_is_log_softmax_and_topk(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 24, dtype=dtype), torch.randn(128, 24, dtype=dtype)
    weight[101:] = float("nan")
    out = head_topk_reference(x, weight, k=8, vocab_size=101, dtype=dtype)
    truth = torch.log_softmax(x @ weight[:101].T, 1).topk(8)
    torch.testing.assert_close(out.values, truth.values)
    assert torch.equal(out.token_ids, truth.indices.int())


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("tiles", [TILES, GATED], ids=["all", "gated"])
def test_ties_go_to_the_lowest_token(device: torch.device, tiles: HeadTiles) -> None:
    logits = torch.zeros(3, 100, device=device)
    logits[0, [5, 7, 40, 41, 99]] = 2.0  # ties inside a chunk and across chunks
    logits[2] = torch.arange(100, device=device) % 4  # the last place is tied between 23 tokens
    x, weight = one_hot(logits)
    for k in (1, 2, 5, 16, 17):
        out = head_topk(x, weight, k=k, vocab_size=100, tiles=tiles)
        assert_same_tokens(out, head_topk_reference(x, weight, k=k, vocab_size=100))
    assert out.token_ids[0, :5].tolist() == [5, 7, 40, 41, 99]
    assert out.token_ids[1].tolist() == list(range(17))


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
def test_minus_zero_ties_with_zero(device: torch.device) -> None:
    scales = torch.ones(64, device=device)
    scales[::2] = -1.0  # 0 * -1 is -0.0: equal to 0.0, though its bits are not
    head = Int8Linear(torch.zeros(64, 16, dtype=torch.int8, device=device), scales)
    out = head_topk(torch.ones(1, 16, device=device), head, k=17, vocab_size=40, tiles=GATED)
    assert out.token_ids.tolist() == [list(range(17))]


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("best", [0, 2, 15, 16, 63, 99])
def test_a_banned_token_is_not_chosen_but_counts_in_the_sum(device: torch.device, best: int) -> None:
    logits = torch.linspace(0, 3, 100, device=device)[
        torch.randperm(100, generator=torch.Generator().manual_seed(1))
    ].repeat(3, 1)
    logits[:, best] = 20.0  # without it log_sum_exp would be about 6
    x, weight = one_hot(logits)
    banned = torch.tensor([best, -1, 50], dtype=torch.int32, device=device)
    for tiles in (TILES, GATED):
        out = head_topk(x, weight, k=4, vocab_size=100, banned=banned, tiles=tiles)
        assert_same_tokens(out, head_topk_reference(x, weight, k=4, vocab_size=100, banned=banned))
        assert best not in out.token_ids[0].tolist()
        assert out.token_ids[1:, 0].tolist() == [best, best]
        assert (out.log_sum_exp > 20).all()


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
def test_banned_tokens_where_everything_ties_and_all_the_rest_is_chosen(device: torch.device) -> None:
    x, weight = one_hot(torch.ones(2, 18, device=device))
    banned = torch.tensor([0, 17], dtype=torch.int32, device=device)  # 17 is alone in the second chunk but for 16
    out = head_topk(x, weight, k=17, vocab_size=18, banned=banned, tiles=GATED)
    assert out.token_ids.tolist() == [list(range(1, 18)), list(range(17))]
    torch.testing.assert_close(out.values, torch.full_like(out.values, -float(torch.tensor(18.0).log())))
    alone = head_topk(x, weight, k=16, vocab_size=17, banned=banned - 1, tiles=TILES)  # 16 is a chunk of its own
    assert alone.token_ids.tolist() == [list(range(16)), list(range(16))]
    assert alone.log_sum_exp.isfinite().all()


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("tiles", [TILES, GATED], ids=["all", "gated"])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_a_broken_row_is_reported_and_the_others_do_not_notice(
    device: torch.device, poison: float, tiles: HeadTiles
) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 32, generator=generator).abs().to(device) for n in (3, 64))
    banned = torch.tensor([-1, 3, -1], dtype=torch.int32, device=device)
    clean = head_topk(x, weight, k=3, vocab_size=50, banned=banned, tiles=tiles)
    x[1, 7] = poison
    out = head_topk(x, weight, k=3, vocab_size=50, banned=banned, tiles=tiles)
    assert out.values[1].isnan().all()
    assert out.log_sum_exp[1].isnan()
    assert out.token_ids[1].tolist() == [0, 0, 0]
    for name in ("values", "token_ids", "log_sum_exp"):
        assert torch.equal(getattr(out, name)[::2], getattr(clean, name)[::2])


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_one_bad_logit_breaks_its_row_even_when_banned(device: torch.device) -> None:
    logits = torch.zeros(3, 40, device=device)
    x, weight = one_hot(logits)
    weight[33, 1] = float("nan")
    x[:, 1] = torch.tensor([0.0, 1.0, 1.0])
    x[0, 1] = 0.0
    out = head_topk(
        x[1:], weight, k=2, vocab_size=40, banned=torch.tensor([33, 2], dtype=torch.int32, device=device), tiles=GATED
    )
    assert out.values.isnan().all()


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
def test_minus_infinity_is_a_logit_like_any_other(device: torch.device) -> None:
    x = torch.zeros(1, 16, device=device)
    x[0, 0] = 1.0
    weight = torch.zeros(64, 16, device=device)
    weight[:, 0] = float("-inf")
    weight[[9, 20], 0] = 1.0
    # 0 * -inf stays out: only column 0 is not finite, and x is 1 there
    out = head_topk(x, weight, k=4, vocab_size=40, tiles=GATED)
    assert out.token_ids.tolist() == [[9, 20, 0, 1]]
    torch.testing.assert_close(out.values[0, :2].exp(), torch.full((2,), 0.5, device=device))
    assert out.values[0, 2:].tolist() == [float("-inf")] * 2


@INTERPRETER
def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(35, 48, generator=generator), torch.randn(128, 48, generator=generator)
    many = head_topk(x, weight, k=5, vocab_size=120, tiles=GATED)
    x[:20] = 9.0
    few = head_topk(x[18:].contiguous(), weight, k=5, vocab_size=120, tiles=GATED)
    for name in ("values", "token_ids", "log_sum_exp"):
        assert torch.equal(getattr(many, name)[20:], getattr(few, name)[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [16, 8])
def test_fixed_tiles_give_a_row_the_same_bits_in_any_batch(dtype: torch.dtype, bits: int, cuda: torch.device) -> None:
    x, weight = torch.randn(320, 1024, device=cuda).to(dtype), torch.randn(32064, 1024, device=cuda) * 0.05
    head = quantize_int8(weight) if bits == 8 else weight.to(dtype)
    tiles = fixed_tiles(1024, 32001, bits, cuda, dtype)
    many = head_topk(x, head, k=8, vocab_size=32001, tiles=tiles)
    for start, end in ((0, 1), (100, 117), (319, 320), (10, 300)):
        few = head_topk(x[start:end].clone(), head, k=8, vocab_size=32001, tiles=tiles)
        for name in ("values", "token_ids", "log_sum_exp"):
            assert torch.equal(getattr(few, name), getattr(many, name)[start:end])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 320])
def test_graph_replay_follows_changing_inputs(dtype: torch.dtype, rows: int, cuda: torch.device) -> None:
    weight = torch.randn(32064, 1024, device=cuda).to(dtype) * 0.05
    x, banned = torch.randn(rows, 1024, device=cuda).to(dtype), torch.full((rows,), 2, dtype=torch.int32, device=cuda)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        head_topk(x, weight, k=8, vocab_size=32001, banned=banned)  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = head_topk(x, weight, k=8, vocab_size=32001, banned=banned)
    for step in range(20):
        x.copy_(torch.randn(rows, 1024, device=cuda))
        banned.random_(-1, 32001)
        if step % 5 == 4:
            x[0] = float("nan")
        graph.replay()
        truth = head_topk(x, weight, k=8, vocab_size=32001, banned=banned)
        assert torch.equal(out.token_ids, truth.token_ids)
        torch.testing.assert_close(out.values, truth.values, rtol=0, atol=0, equal_nan=True)
        assert bool(out.values[0].isnan().all()) == (step % 5 == 4)
