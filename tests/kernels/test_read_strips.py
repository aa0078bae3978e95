import pytest
import torch

from kernels.read_strips import STRIP_WORDS, read_strips, read_strips_reference


def test_every_word_is_read_once(cpu: torch.device) -> None:
    words = torch.randint(-(2**13), 2**13, (3 * STRIP_WORDS,), dtype=torch.int32, device=cpu)
    assert torch.equal(read_strips(words), read_strips_reference(words))


@pytest.mark.gpu
def test_gpu_every_word_is_read_once_and_sums_wrap(cuda: torch.device) -> None:
    words = torch.randint(-(2**31), 2**31, (5000 * STRIP_WORDS,), dtype=torch.int64, device=cuda).int()
    assert torch.equal(read_strips(words), read_strips_reference(words))


def test_sums_of_the_reference_wrap_as_int32_does() -> None:
    words = torch.full((STRIP_WORDS,), 2**31 - 1, dtype=torch.int32)
    assert read_strips_reference(words).tolist() == [-STRIP_WORDS]


@pytest.mark.parametrize(
    "words",
    [torch.zeros(STRIP_WORDS - 1, dtype=torch.int32), torch.zeros(STRIP_WORDS), torch.zeros(2, STRIP_WORDS)],
    ids=str,
)
def test_other_words_are_refused(words: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="words are"):
        read_strips(words)
