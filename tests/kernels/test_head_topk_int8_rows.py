"""`head_topk` of rows in int8: products of codes are exact, so what comes out can be held to the last bit."""

import pytest
import torch

from kernels.head_topk import HeadTiles, head_topk, head_topk_reference, row_logits
from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.quantized_rows import QuantizedRows, quantize_rows

TILES = HeadTiles(16, 16, block_features=32)
GATED = HeadTiles(32, 32, 16, block_features=32, slice_rows=16, gated=True)
EVERYWHERE = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def exact_logits(x: QuantizedRows, head: Int8Linear, vocab_size: int) -> torch.Tensor:
    """fp32[R, V]: the int32 sum, rounded once to fp32, times the token's scale, times the row's."""
    sums = (x.codes.cpu().long() @ head.codes.cpu()[:vocab_size].long().T).float()
    return sums * head.scales.cpu()[None, :vocab_size] * x.scales.cpu()[:, None]


def case(rows: int, features: int, vocab_size: int, device: torch.device) -> tuple[QuantizedRows, Int8Linear]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(-(-vocab_size // 64) * 64, features, generator=generator)
    head = quantize_int8(weight.to(device))
    head.codes[vocab_size:], head.scales[vocab_size:] = 127, 1e30  # padding that nobody may read
    return quantize_rows(torch.randn(rows, features, generator=generator).to(device)), head


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize(("rows", "features", "vocab_size"), [(3, 33, 100), (35, 64, 129), (1, 96, 64)])
def test_logits_are_those_of_the_codes_to_the_last_bit(
    device: torch.device, rows: int, features: int, vocab_size: int
) -> None:
    x, head = case(rows, features, vocab_size, device)
    scratch, logits = (torch.full((rows, vocab_size), float("nan"), device=device) for _ in range(2))
    head_topk(x, head, k=3, vocab_size=vocab_size, logits_scratch=scratch, tiles=TILES)
    assert torch.equal(row_logits(scratch, logits, TILES).cpu(), exact_logits(x, head, vocab_size))


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("tiles", [TILES, GATED, None], ids=["all", "gated", "default"])
def test_tokens_are_the_same_with_any_tiles(device: torch.device, tiles: HeadTiles | None) -> None:
    x, head = case(35, 64, 257, device)
    banned = torch.arange(-1, 34, dtype=torch.int32, device=device)
    out = head_topk(x, head, k=8, vocab_size=257, banned=banned, tiles=tiles)
    truth = head_topk_reference(x, head, k=8, vocab_size=257, banned=banned, dtype=torch.float64)
    assert torch.equal(out.token_ids, truth.token_ids)
    torch.testing.assert_close(out.values.double(), truth.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.log_sum_exp.double(), truth.log_sum_exp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
def test_extreme_codes_neither_wrap_nor_saturate(device: torch.device) -> None:
    codes = torch.full((2, 2048), 127, dtype=torch.int8, device=device)
    codes[1] = -127
    head = Int8Linear(torch.full((64, 2048), 127, dtype=torch.int8, device=device), torch.ones(64, device=device))
    head.codes[7, 0] = 126
    scratch, logits = torch.empty(2, 64, device=device), torch.empty(2, 64, device=device)
    x = QuantizedRows(codes, torch.ones(2, device=device))
    head_topk(x, head, k=1, vocab_size=64, logits_scratch=scratch, tiles=TILES)
    whole = 127.0 * 127 * 2048
    assert row_logits(scratch, logits, TILES)[:, 0].tolist() == [whole, -whole]  # beyond the 24 bits of fp32
    assert logits[1, 7] > logits[1, 6]


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_a_row_that_was_not_finite_is_reported_and_the_others_do_not_notice(device: torch.device) -> None:
    x, head = case(3, 64, 100, device)
    clean = head_topk(x, head, k=4, vocab_size=100, tiles=GATED)
    x.scales[1] = float("nan")
    out = head_topk(x, head, k=4, vocab_size=100, tiles=GATED)
    assert out.values[1].isnan().all()
    assert out.log_sum_exp[1].isnan()
    assert out.token_ids[1].tolist() == [0] * 4
    for name in ("values", "token_ids", "log_sum_exp"):
        assert torch.equal(getattr(out, name)[::2], getattr(clean, name)[::2])


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
def test_a_row_of_zeros_ties_everywhere(device: torch.device) -> None:
    _, head = case(1, 64, 100, device)
    out = head_topk(quantize_rows(torch.zeros(1, 64, device=device)), head, k=5, vocab_size=100, tiles=GATED)
    assert out.token_ids.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(out.log_sum_exp.cpu(), torch.tensor([100.0]).log())


def test_bad_rows_are_refused() -> None:
    x, head = case(2, 64, 100, torch.device("cpu"))
    with pytest.raises(ValueError, match="int8 rows need an int8 head"):
        head_topk(x, torch.zeros(128, 64), k=1, vocab_size=100)
    with pytest.raises(ValueError, match=r"want contiguous float32\[2\]"):
        head_topk(QuantizedRows(x.codes, x.scales[:1]), head, k=1, vocab_size=100)
    with pytest.raises(ValueError, match="want contiguous int8"):
        head_topk(QuantizedRows(x.codes.float(), x.scales), head, k=1, vocab_size=100)
    with pytest.raises(ValueError, match=r"x wants \[V_pad, 63\]"):
        head_topk(QuantizedRows(x.codes[:, :63].contiguous(), x.scales), head, k=1, vocab_size=100)
    with pytest.raises(ValueError, match="tensor descriptors are for"):
        head_topk(x, head, k=1, vocab_size=100, tiles=HeadTiles(16, 16, tma=True))
