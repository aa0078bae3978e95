"""The head's kernels for Hopper alone, specialized and online: what they compile to, and what only they do."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernels.head_checks import HEAD_LIMIT
from kernels.head_topk import HeadTiles, fixed_tiles, head_topk, head_topk_reference, row_logits
from kernels.int8_linear import quantize_int8
from kernels.quantized_rows import quantize_rows

SPECIALIZED = HeadTiles(128, 128, gated=True, tma=True, specialized=True)
ONLINE = HeadTiles(128, 256, 64, stages=6, gated=True, tma=True, specialized=True, online=True)
INT8_ONLINE = replace(ONLINE, block_features=128)


def test_specialized_tiles_halve_their_chunks_and_compile_without_an_interpreter() -> None:
    assert SPECIALIZED.chunk == 64
    assert replace(SPECIALIZED, block_vocab=256).chunk == 128
    found = compiled_ptx(SPECIALIZED)
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in found
    assert "cp.async.bulk.tensor.2d" in found


def test_online_tiles_have_whole_chunks_in_plain_order_and_compile_without_an_interpreter() -> None:
    assert (ONLINE.chunk, ONLINE.laned) == (128, False)
    assert replace(ONLINE, online=False).laned
    found = compiled_ptx(ONLINE)
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in found
    assert ".reqntid 640" in found  # five groups of four warps, one for every 64 rows, and none beside them
    assert found.count("vote.sync.any") == 10  # a warp jumps over the stores of a row that it does not keep


def test_online_tiles_take_int8_rows_with_the_scales_of_a_tile_in_shared_memory() -> None:
    found = compiled_ptx(INT8_ONLINE, 8)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in found
    assert "cp.async.bulk.tensor.1d" in found
    assert found.count("cvt.rn.f32.s32") == 5 * 64  # every sum of the five groups becomes a float once
    assert ".reqntid 640" in found


def compiled_ptx(tiles: HeadTiles, bits: int = 16) -> str:
    """PTX of the first launch with these tiles on Hopper, compiled by another process: this one may interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.format(tiles=tiles, bits=bits, dtype="bfloat16" if bits == 16 else "int8")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout


COMPILE = """
import torch
from kernels.compile_ahead import compile_kernel
from kernels.head_topk.jobs import head_jobs
from kernels.head_topk.tiles import HeadTiles
print(compile_kernel(head_jobs(64, 1000, 2, {bits}, {tiles}, torch.{dtype})[0], 90).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("bits", "k", "has_banned", "spills"),
    [(16, 8, True, 32), (16, 16, True, 32), (16, 17, False, 32), (8, 8, True, 48), (8, 16, True, 80)],
)
def test_five_groups_of_online_tiles_fit_their_registers(bits: int, k: int, has_banned: bool, spills: int) -> None:
    """96 a lane, 64 of them sums: one address too many, and what spills makes the launch a quarter slower. int8 keeps the
    scales of a lane's two rows, too."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tiles, dtype = (ONLINE, "bfloat16") if bits == 16 else (INT8_ONLINE, "int8")
    code = REGISTERS.format(k=k, has_banned=has_banned, tiles=tiles, bits=bits, dtype=dtype)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    registers, spill_bytes = map(int, found.stdout.split())
    assert registers <= 96  # of 64k, by 640 threads
    assert spill_bytes <= spills


REGISTERS = """
import torch
from kernels.compile_ahead import compile_ahead
from kernels.head_topk.jobs import head_jobs
from kernels.head_topk.tiles import HeadTiles
job = head_jobs(1024, 128000, {k}, {bits}, {tiles}, torch.{dtype}, has_banned={has_banned})[0]
found = compile_ahead([job], 90, 1)[0]
print(found.registers, found.spill_bytes)
"""


@pytest.mark.parametrize(
    "changes", [{"specialized": False}, {"block_vocab": 256}, {"block_features": 16}, {"block_rows": 32}], ids=str
)
def test_online_tiles_that_do_not_exist(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"online tiles|specialized tiles"):
        replace(ONLINE, **changes)  # type: ignore[arg-type]


def test_online_tiles_of_other_rows_than_they_are_for() -> None:
    x, weight = torch.randn(3, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    with pytest.raises(ValueError, match="block_features to 64"):
        head_topk(x, weight, k=2, vocab_size=128, tiles=INT8_ONLINE)
    with pytest.raises(ValueError, match="online=False"):
        head_topk(x, quantize_int8(weight.float()), k=2, vocab_size=128, tiles=ONLINE)


def test_fixed_tiles_are_never_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.head_topk.tiles.select_tiles", lambda *_: ONLINE)
    tiles = fixed_tiles(1024, 128000, 16, torch.device("cpu"), torch.bfloat16)
    assert tiles == replace(ONLINE, extra_rows=0, online=False)


@pytest.mark.gpu
def test_online_tiles_want_room_for_two_logits_at_a_time(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("a kernel for Hopper")
    x, weight = (torch.randn(n, 64, device=cuda).bfloat16() for n in (3, 128))
    scratch = torch.empty(3 * 128 + 1, device=cuda)[1:].view(3, 128)
    with pytest.raises(ValueError, match="multiple of 8 bytes"):
        head_topk(x, weight, k=2, vocab_size=128, logits_scratch=scratch, tiles=ONLINE)
    int8 = quantize_int8(weight.float())
    with pytest.raises(ValueError, match="online=False"):
        head_topk(x, int8, k=2, vocab_size=128, tiles=ONLINE)


@pytest.mark.gpu
def test_ungated_logits_of_online_tiles_come_back_in_the_order_of_tokens(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("a kernel for Hopper")
    x, weight = torch.randn(311, 96, device=cuda).bfloat16(), torch.randn(1000, 96, device=cuda).bfloat16()
    tiles = replace(ONLINE, gated=False)
    scratch, out = torch.full((311, 1000), float("nan"), device=cuda), torch.full((311, 999), float("nan"), device=cuda)
    head_topk(x, weight, k=3, vocab_size=999, logits_scratch=scratch, tiles=tiles)
    torch.testing.assert_close(row_logits(scratch, out, tiles), x.float() @ weight[:999].float().T, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_online_tiles_break_the_right_rows_only(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("a kernel for Hopper")
    x, weight = torch.randn(130, 64, device=cuda).bfloat16(), torch.randn(40001, 64, device=cuda).bfloat16()
    x[3, 5], x[70, 0], x[129] = float("nan"), float("inf"), 0.0
    x[129, 1] = 3e38  # two of its logits lie past what fp32 holds, one on either side
    weight[:, 1] = 0.0
    weight[39000, 1], weight[1, 1] = 16.0, -16.0
    truth = head_topk_reference(x, weight, k=8, vocab_size=40001)
    out = head_topk(x, weight, k=8, vocab_size=40001, tiles=ONLINE)
    broken = out.log_sum_exp.isnan()
    assert broken.nonzero().flatten().tolist() == [3, 70, 129]
    assert out.values[broken].isnan().all()
    assert not out.token_ids[broken].any()
    torch.testing.assert_close(out.log_sum_exp[~broken], truth.log_sum_exp[~broken], rtol=0, atol=HEAD_LIMIT)
    torch.testing.assert_close(out.values[~broken], truth.values[~broken], rtol=0, atol=HEAD_LIMIT)


@pytest.mark.gpu
def test_logits_of_online_int8_tiles_are_those_of_the_codes_to_the_last_bit(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("a kernel for Hopper")
    x, head = quantize_rows(torch.randn(311, 96, device=cuda)), quantize_int8(torch.randn(1000, 96, device=cuda))
    head.scales[999:] = 1e30  # padding that nobody may read
    tiles = replace(INT8_ONLINE, gated=False)
    scratch, out = torch.full((311, 1000), float("nan"), device=cuda), torch.full((311, 999), float("nan"), device=cuda)
    head_topk(x, head, k=3, vocab_size=999, logits_scratch=scratch, tiles=tiles)
    sums = (x.codes.double() @ head.codes[:999].double().T).float()
    assert torch.equal(row_logits(scratch, out, tiles), sums * head.scales[None, :999] * x.scales[:, None])
