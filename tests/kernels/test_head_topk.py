from dataclasses import replace

import pytest
import torch

from kernels.head_checks import HEAD_LIMIT, HOPPER_HEADS, LARGE_HEADS, SMALL_HEADS, HeadCase, check_head_case, large_heads
from kernels.head_topk import HeadTiles, TopTokens, fixed_tiles, head_topk, head_topk_reference, row_logits
from kernels.head_topk.tiles import default_tiles
from kernels.int8_linear import Int8Linear, quantize_int8

TILES = HeadTiles(16, 16, block_features=16)
GATED = HeadTiles(16, 16, block_features=16, gated=True)
EVERYWHERE = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
SPECIALIZED = HeadTiles(128, 128, gated=True, tma=True, specialized=True)
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


def test_gated_tiles_leave_logits_unwritten_that_cannot_be_chosen(cpu: torch.device) -> None:
    logits = torch.linspace(5, 0, 256)[None, :].repeat(2, 1)  # the best chunk comes first
    x, weight = one_hot(logits)
    scratch = torch.full((2, 256), float("nan"))
    out = head_topk(x, weight, k=2, vocab_size=256, logits_scratch=scratch, tiles=GATED)
    assert out.token_ids.tolist() == [[0, 1], [0, 1]]
    written = scratch.flatten()  # chunk by chunk, both rows of one side by side
    assert not written[: 2 * 32].isnan().any()
    assert written[2 * 32 :].isnan().all()


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
def test_the_start_lowers_thresholds_and_flags_tiles_with_banned_tokens(device: torch.device) -> None:
    from kernels.head_topk.kernel import head_start_kernel

    banned = torch.tensor([-1, 0, 127, 128, 600, 1000, 4], dtype=torch.int32, device=device)  # 1000: past the vocabulary
    thresholds = torch.zeros(20, dtype=torch.int32, device=device)
    flags = torch.full((6,), 7, dtype=torch.int32, device=device)
    sizes = {"BV": 128, "FLAGS": 8, "BLOCK": 4, "HAS_BANNED": True, "OVERLAP": False}
    head_start_kernel[(1,)](thresholds, flags, banned, 18, len(banned), 640, **sizes)
    assert thresholds.tolist() == [-(2**31)] * 18 + [0, 0]
    assert flags.tolist() == [1, 1, 0, 0, 1, 7]


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("vocab_size", [128, 200])  # whole chunks of 64; 200: the last one is 8 wide, in plain order
def test_the_merge_reads_logits_in_the_order_of_the_specialized_kernel(device: torch.device, vocab_size: int) -> None:
    from kernels.head_topk.kernel import head_merge_kernel

    rows, k, width, pack = 3, 5, 64, 2
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5))
    num_chunks = -(-vocab_size // width)
    partials = torch.full((-(-num_chunks // pack), rows, pack, 2), float("nan"))
    pieces = []
    for c in range(num_chunks):
        chunk = logits[:, c * width : (c + 1) * width]
        top = chunk.amax(1)
        partials[c // pack, :, c % pack] = torch.stack((top, (chunk - top[:, None]).exp().sum(1)), 1)
        if chunk.shape[1] == width:  # token 8 * (2 t + b) + 2 * lane + e lies at 16 t + 4 * lane + 2 b + e
            chunk = chunk.reshape(rows, width // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(rows, width)
        pieces.append(chunk.flatten())
    ids = torch.zeros((rows, k), dtype=torch.int32, device=device)
    values, lse = torch.zeros((rows, k), device=device), torch.zeros(rows, device=device)
    sizes = {"BV": width, "C_PAD": 4, "P_PAD": 0, "PACK": pack, "LANED": True, "K": k, "K_PAD": 8}
    stored = torch.cat(pieces).to(device)
    inputs = (partials.to(device), lse, ids, lse, stored)
    outputs = (values, ids, lse, rows, rows, 0, vocab_size)
    head_merge_kernel[(rows,)](*inputs, *outputs, **sizes, HAS_BANNED=False, OVERLAP=False)
    truth = torch.log_softmax(logits, 1).topk(k)
    assert ids.tolist() == truth.indices.tolist()
    torch.testing.assert_close(values.cpu(), truth.values)


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("has_banned", [False, True])
@pytest.mark.parametrize("vocab_size", [128, 200])
def test_the_merge_takes_maxima_and_sums_that_lie_apart(device: torch.device, vocab_size: int, has_banned: bool) -> None:
    from kernels.head_topk.kernel import head_merge_kernel

    rows, padded, programs, k, width, pack = 3, 4, 5, 5, 64, 2
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(6))
    banned = torch.tensor([-1, 7, vocab_size - 1], dtype=torch.int32)
    for row in (1, 2):  # a token that may not be chosen counts in log_sum_exp, here most of all
        logits[row, banned[row]] = 9.0
    choosable = logits.clone()
    if has_banned:
        choosable[[1, 2], banned[1:].long()] = float("-inf")
    num_chunks = -(-vocab_size // width)
    tops = torch.full((-(-num_chunks // pack), padded, pack), float("nan"))
    for c in range(num_chunks):
        tops[c // pack, :rows, c % pack] = choosable[:, c * width : (c + 1) * width].amax(1)
    sums = torch.full((programs, padded, 2), float("nan"))
    for p in range(programs):  # any share of the tokens; one that has seen nothing at all tells (-inf, 0)
        share = logits[:, p::3] if p < 3 else torch.full((rows, 1), float("-inf"))
        sums[p, :rows, 0] = share.amax(1)
        sums[p, :rows, 1] = (share - share.amax(1).clamp_min(-99.0)[:, None]).exp().sum(1)
    stored = torch.cat([logits[:, c : c + width].flatten() for c in range(0, vocab_size, width)])
    ids = torch.zeros((rows, k), dtype=torch.int32, device=device)
    values, lse = torch.zeros((rows, k), device=device), torch.zeros(rows, device=device)
    sizes = {"BV": width, "C_PAD": 4, "P_PAD": 8, "PACK": pack, "LANED": False, "K": k, "K_PAD": 8}
    inputs = (tops.to(device), sums.to(device), banned.to(device), lse, stored.to(device))
    outputs = (values, ids, lse, rows, padded, programs, vocab_size)
    head_merge_kernel[(rows,)](*inputs, *outputs, **sizes, HAS_BANNED=has_banned, OVERLAP=False)
    truth = torch.logsumexp(logits, 1)
    best = choosable.topk(k)
    assert ids.tolist() == best.indices.tolist()
    torch.testing.assert_close(lse.cpu(), truth)
    torch.testing.assert_close(values.cpu(), best.values - truth[:, None])


@pytest.mark.parametrize("vocab_size", [200, 256])  # with and without a last chunk that is not whole
def test_ungated_logits_come_back_in_the_order_of_tokens(cpu: torch.device, vocab_size: int) -> None:
    x, weight = torch.randn(5, 32), torch.randn(256, 32)
    tiles = HeadTiles(32, 16)
    scratch, out = torch.full((5, vocab_size), float("nan")), torch.full((5, vocab_size), float("nan"))
    head_topk(x, weight, k=3, vocab_size=vocab_size, logits_scratch=scratch, tiles=tiles)
    torch.testing.assert_close(row_logits(scratch, out, tiles), x @ weight[:vocab_size].T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="gated=False"):
        row_logits(scratch, out, replace(tiles, gated=True))


def test_logits_of_specialized_tiles_come_back_in_the_order_of_tokens() -> None:
    rows, width, vocab_size = 3, 64, 200
    tiles = HeadTiles(128, 128, specialized=True, tma=True)
    logits = torch.randn(rows, vocab_size)
    pieces = []
    for first in range(0, vocab_size, width):
        chunk = logits[:, first : first + width]
        if chunk.shape[1] == width:
            place = torch.arange(width)  # as the merge kernel reads it: which token lies at a place
            chunk = chunk[:, place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2]
        pieces.append(chunk.flatten())
    assert torch.equal(row_logits(torch.cat(pieces), torch.empty_like(logits), tiles), logits)


def test_no_rows(cpu: torch.device) -> None:
    out = head_topk(torch.empty(0, 32), torch.randn(64, 32), k=2, vocab_size=50)
    assert out.values.shape == (0, 2)
    assert out.log_sum_exp.shape == (0,)


def test_int8_weights_are_within_half_a_step() -> None:
    weight = torch.randn(64, 48) * torch.rand(64, 1) * 10
    weight[5] = 0.0
    head = quantize_int8(weight)
    error = (head.dequantized(torch.float32) - weight).abs().amax(1)
    assert (error <= weight.abs().amax(1) / 127 * 0.501).all()


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_default_tiles_fit_the_smallest_shared_memory(rows: int, dtype: torch.dtype) -> None:
    t = default_tiles(rows, dtype)
    step_bytes = (t.block_vocab + t.block_rows + t.extra_rows) * t.block_features * dtype.itemsize
    assert step_bytes * t.stages <= 65536
    assert t.gated == (rows > 32)


def test_fixed_tiles_do_not_know_the_number_of_rows() -> None:
    tiles = fixed_tiles(1024, 128000, 16, torch.device("cpu"), torch.bfloat16)
    assert tiles.extra_rows == 0
    assert tiles.block_rows == 64


GOOD = {"weight": torch.zeros(64, 32), "k": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(64, 31)}, r"x wants \[V_pad, 32\]"),
        ({"weight": torch.zeros(64, 32).half()}, "convert one of them"),
        ({"weight": torch.zeros(32, 64).T}, "contiguous"),
        ({"vocab_size": 65}, "the weight has 64 rows"),
        ({"vocab_size": 0}, "the weight has 64 rows"),
        ({"k": 0}, "choose 1 to 17"),
        ({"k": 18}, "choose 1 to 17"),
        ({"k": 17, "vocab_size": 16}, "choose a smaller k"),
        ({"k": 17, "vocab_size": 17, "banned": torch.zeros(3, dtype=torch.int32)}, "choose a smaller k"),
        ({"banned": torch.zeros(3, dtype=torch.int64)}, r"banned must be int32\[3\]"),
        ({"banned": torch.zeros(2, dtype=torch.int32)}, r"banned must be int32\[3\]"),
        ({"logits_scratch": torch.zeros(3, 49)}, "logits_scratch must be"),
        ({"logits_scratch": torch.zeros(3, 64).half()}, "logits_scratch must be"),
        ({"out": TopTokens(torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.int32), torch.zeros(3))}, r"make it \[3, 2\]"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_topk(torch.zeros(3, 32), **(GOOD | changes))  # type: ignore[arg-type]


def test_bad_tiles_and_bad_int8_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor descriptors need a multiple of 16"):
        head_topk(torch.zeros(1, 24), torch.zeros(64, 24), k=1, vocab_size=50, tiles=HeadTiles(16, 16, tma=True))
    with pytest.raises(ValueError, match="are for 16-bit weights"):
        int8 = quantize_int8(torch.ones(64, 16))
        head_topk(torch.zeros(1, 16), int8, k=1, vocab_size=50, tiles=HeadTiles(16, 16, tma=True))
    with pytest.raises(ValueError, match="specialized tiles need bf16, fp16 or int8 rows on compute capability 9"):
        head_topk(torch.zeros(1, 16).half(), torch.zeros(64, 16).half(), k=1, vocab_size=50, tiles=SPECIALIZED)
    with pytest.raises(ValueError, match="specialized tiles: block_vocab and block_rows"):
        replace(SPECIALIZED, block_rows=64)
    with pytest.raises(ValueError, match="specialized tiles: block_vocab and block_rows"):
        replace(SPECIALIZED, tma=False)
    with pytest.raises(ValueError, match="larger block_vocab"):
        head_topk(torch.zeros(1, 1), torch.zeros(140000, 1), k=1, vocab_size=140000, tiles=TILES)
    with pytest.raises(ValueError, match="block_vocab is 48"):
        HeadTiles(48, 16)
    with pytest.raises(ValueError, match="block_rows is 8"):
        HeadTiles(64, 8)
    with pytest.raises(ValueError, match=r"scales are .* want float32\[4\]"):
        Int8Linear(torch.zeros(4, 32, dtype=torch.int8), torch.zeros(3))
    with pytest.raises(ValueError, match=r"codes are .* want int8"):
        Int8Linear(torch.zeros(4, 32), torch.zeros(4))
