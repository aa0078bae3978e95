"""Which tiles and operands the head takes, and what it says of others."""

from dataclasses import replace

import pytest
import torch

from kernels.head_topk import HeadTiles, TopTokens, fixed_tiles, head_topk
from kernels.head_topk.tiles import default_tiles
from kernels.int8_linear import Int8Linear, quantize_int8

TILES = HeadTiles(16, 16, block_features=16)
SPECIALIZED = HeadTiles(128, 128, gated=True, tma=True, specialized=True)


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
    for hopper in (SPECIALIZED, replace(SPECIALIZED, block_rows=256, online=True)):  # a ring of one would wait for itself
        with pytest.raises(ValueError, match="2 or more"):
            replace(hopper, stages=1)
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
