import math

import pytest
import torch
from torch.nn import functional

from kernels.attention_checks import check_inputs
from kernels.checks import LIMITS
from kernels.encoder_attention import encoder_attention, encoder_attention_reference
from kernels.encoder_attention_checks import EncoderCase, EncoderInputs, encoder_cases, encoder_inputs

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", encoder_cases(large=False), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreter_matches_reference(case: EncoderCase, dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_inputs(encoder_inputs(case, cpu, dtype)) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("case", encoder_cases(large=True), ids=lambda c: c.name[:60])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_gpu_matches_reference(case: EncoderCase, dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_inputs(encoder_inputs(case, cuda, dtype)) <= LIMITS[dtype]


def test_reference_is_torch_attention() -> None:
    qkv = torch.randn(9, 3 * 32)
    starts, ends = (torch.tensor(v, dtype=torch.int32) for v in ([0] * 2 + [2] * 6 + [5], [2] * 2 + [8] * 6 + [5]))
    out = encoder_attention_reference(qkv, starts, ends, num_heads=2)
    for start, end in ((0, 2), (2, 8)):
        query, key, value = qkv[start:end].view(-1, 3, 2, 16).permute(1, 2, 0, 3).unbind(0)
        wanted = functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out[start:end], wanted)
    assert out[8].eq(0).all()


def check_batch_mates(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
    pack = encoder_inputs(EncoderCase(2, 64, lengths), device, dtype)
    together = pack.run()
    at = 0
    for length in lengths:
        if length > 0:
            one = pack.qkv[at : at + length].contiguous()
            starts = torch.zeros(length, dtype=torch.int32, device=device)
            out = encoder_attention(one, starts, starts + length, num_heads=2)
            assert torch.equal(out, together[at : at + length])
        at += abs(length)


def test_bits_do_not_depend_on_the_place_in_the_pack(cpu: torch.device) -> None:
    check_batch_mates((5, 40, -3, 1, 70, 29), cpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_bits_do_not_depend_on_the_place_in_the_pack_on_the_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    check_batch_mates((5, 200, -3, 1, 333, 64, 129), cuda, dtype)


def check_overflowed_neighbour(device: torch.device, dtype: torch.dtype) -> None:
    inputs = encoder_inputs(EncoderCase(1, 64, (5, 40, 9)), device, dtype)
    clean = inputs.run()
    for garbage in (math.nan, math.inf):
        inputs.qkv[5:45] = garbage
        spoiled = inputs.run()
        assert torch.equal(spoiled[:5], clean[:5])
        assert torch.equal(spoiled[45:], clean[45:])
        assert spoiled[5:45].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_a_sentence_that_overflowed_does_not_reach_its_neighbours(cpu: torch.device) -> None:
    check_overflowed_neighbour(cpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sentence_that_overflowed_does_not_reach_its_neighbours_on_the_gpu(dtype: torch.dtype, cuda: torch.device) -> None:
    check_overflowed_neighbour(cuda, dtype)


def test_rows_may_be_strided(cpu: torch.device) -> None:
    inputs = encoder_inputs(EncoderCase(1, 16, (20, 6)), cpu, torch.float32)
    wide = torch.full((26, 80), math.nan)
    wide[:, :48] = inputs.qkv
    strided = EncoderInputs(wide[:, :48], inputs.token_starts, inputs.token_ends, 1)
    assert torch.equal(strided.run(), inputs.run())


def test_no_tokens(cpu: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert encoder_attention(torch.zeros(0, 96), none, none, num_heads=2).shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_graph_follows_inputs_changed_in_place(dtype: torch.dtype, cuda: torch.device) -> None:
    packs = ((100, 20, 8), (1, 126, -1), (-128,), (3, 3, 3, 3, 3, 80, -33))
    first, *others = (encoder_inputs(EncoderCase(4, 64, lengths), cuda, dtype, seed) for seed, lengths in enumerate(packs))
    first.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = encoder_attention(first.qkv, first.token_starts, first.token_ends, num_heads=4)
    for inputs in others:
        for name in ("qkv", "token_starts", "token_ends"):
            getattr(first, name).copy_(getattr(inputs, name))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, inputs.run())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"qkv": torch.zeros(3, 3, 32)}, r"want \[S_total, 3D\]"),
        ({"qkv": torch.zeros(96, 3).T}, "contiguous rows"),
        ({"qkv": torch.zeros(3, 96, dtype=torch.float64)}, "want float32, float16 or bfloat16"),
        ({"qkv": torch.zeros(3, 95)}, "does not divide into 3 x 2 heads"),
        ({"num_heads": 4}, "head_dim is 8; choose num_heads"),
        ({"token_starts": torch.zeros(2, dtype=torch.int32)}, r"token_starts is \(2,\); want \[3\]"),
        ({"token_ends": torch.zeros(3, dtype=torch.int64)}, "token_ends is torch.int64; convert it to int32"),
        ({"token_ends": torch.zeros(6, dtype=torch.int32)[::2]}, "token_ends must be contiguous"),
        ({"out": torch.zeros(3, 96)}, "want contiguous"),
    ],
)
def test_bad_input_is_refused(kwargs: dict[str, object], message: str) -> None:
    index = torch.zeros(3, dtype=torch.int32)
    good: dict[str, object] = {"qkv": torch.zeros(3, 96), "token_starts": index, "token_ends": index, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        encoder_attention(**(good | kwargs))  # type: ignore[arg-type]
