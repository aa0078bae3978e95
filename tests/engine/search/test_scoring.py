"""Selection and length penalty against sorted rows and plain Python."""

from __future__ import annotations

import pytest
import torch

from engine.search.scoring import best_token, length_normalizer, log_softmax_, top_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [3, 10, 127, 2048, 2049, 2175, 5000, 12032])
@pytest.mark.parametrize("k", [2, 8, 16])
def test_top_tokens_equals_a_full_sort(vocab_size: int, k: int, device: str) -> None:
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(vocab_size + k))
    logits[0, -min(k, vocab_size) :] = torch.arange(min(k, vocab_size)) + 10.0  # all the best at the ragged end
    logits[1, : vocab_size - 1] = float("-inf")  # one finite value only
    logits = logits.to(device)
    values, token_ids = top_tokens(logits, k)
    expected = logits.sort(descending=True).values[:, :k]
    assert torch.equal(values, expected)
    assert torch.equal(logits.gather(1, token_ids), values)
    assert all(len(set(row)) == len(row) for row in token_ids.tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [3, 127, 2048, 2049, 5000, 12032])
def test_best_token_is_the_first_maximum(vocab_size: int, device: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randint(0, 40, (200, vocab_size), generator=generator).float()  # full of ties
    logits[0, -1] = 99.0
    logits[1] = float("-inf")
    logits[2, :-1] = float("-inf")
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert best_token(logits.to(device)).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [1, 3, 53, 1024, 4097, 12031, 256206])
@pytest.mark.parametrize("num_rows", [1, 5, 33])
def test_log_softmax_in_place_equals_the_textbook(vocab_size: int, num_rows: int, device: str) -> None:
    logits = 9 * torch.randn(num_rows + 2, vocab_size, generator=torch.Generator().manual_seed(num_rows))
    logits[1] = float("nan") if num_rows == 1 else logits[1]
    logits = logits.to(device)
    expected = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    inner = log_softmax_(logits[1:-1])  # rows of a larger buffer
    assert inner.data_ptr() == logits[1].data_ptr()
    torch.testing.assert_close(logits[1:-1].double(), expected[1:-1], atol=2e-5, rtol=1e-5, equal_nan=True)


def test_top_tokens_reads_rows_of_a_wider_buffer() -> None:
    wide = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(top_tokens(wide[:, :2500], 4)[0], wide[:, :2500].topk(4).values)


def test_length_normalizer_is_a_float64_power_rounded_once() -> None:
    lengths, penalties = torch.tensor([1, 7, 200, 3]), torch.tensor([1.0, 0.6, 2.0, -0.5], dtype=torch.float64)
    expected = [n**a for n, a in zip([1, 7, 200, 3], [1.0, 0.6, 2.0, -0.5], strict=True)]
    assert torch.equal(length_normalizer(lengths, penalties), torch.tensor(expected, dtype=torch.float64).float())
