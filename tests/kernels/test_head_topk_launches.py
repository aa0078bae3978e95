"""What the launches of the head hand over to each other: thresholds, flags, maxima and sums, and logits in their order."""

from dataclasses import replace

import pytest
import torch

from kernels.head_topk import HeadTiles, head_topk, row_logits

EVERYWHERE = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def test_gated_tiles_leave_logits_unwritten_that_cannot_be_chosen(cpu: torch.device) -> None:
    logits = torch.linspace(5, 0, 256)[None, :].repeat(2, 1)  # the best chunk comes first
    x, weight = torch.eye(2, 16), torch.nn.functional.pad(logits.T, (0, 14)).contiguous()
    scratch = torch.full((2, 256), float("nan"))
    out = head_topk(
        x, weight, k=2, vocab_size=256, logits_scratch=scratch, tiles=HeadTiles(16, 16, block_features=16, gated=True)
    )
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
    from kernels.head_topk.merge import head_merge_kernel

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
    inputs = (partials.to(device), lse, ids, lse, stored, lse)
    outputs = (values, ids, lse, rows, rows, 0, vocab_size)
    head_merge_kernel[(rows,)](*inputs, *outputs, **sizes, HAS_BANNED=False, SCALED=False, OVERLAP=False)
    truth = torch.log_softmax(logits, 1).topk(k)
    assert ids.tolist() == truth.indices.tolist()
    torch.testing.assert_close(values.cpu(), truth.values)


@pytest.mark.parametrize("device", EVERYWHERE, ids=str)
@pytest.mark.parametrize("has_banned", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("vocab_size", [192, 200])
def test_the_merge_takes_maxima_and_sums_that_lie_apart(
    device: torch.device, vocab_size: int, scaled: bool, has_banned: bool
) -> None:
    from kernels.head_topk.merge import head_merge_kernel

    rows, padded, programs, k, width, pack = 3, 4, 5, 2, 64, 2
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(6))
    banned = torch.tensor([-1, 7, vocab_size - 1], dtype=torch.int32)
    logits[1, 70], logits[1, 130], logits[2, 7], logits[2, 70] = 5.0, 6.0, 5.0, 6.0  # of two chunks, not the banned one's
    for row in (1, 2):  # a token that may not be chosen counts in log_sum_exp, here most of all
        logits[row, banned[row]] = 9.0
    choosable = logits.clone()
    if has_banned:
        choosable[[1, 2], banned[1:].long()] = float("-inf")
    num_chunks = -(-vocab_size // width)
    tops = torch.full((-(-num_chunks // pack), padded, pack), float("nan"))
    for c in range(num_chunks):
        tops[c // pack, :rows, c % pack] = logits[:, c * width : (c + 1) * width].amax(1)  # banned or not
    sums = torch.full((programs, padded, 2), float("nan"))
    for p in range(programs):  # any share of the tokens; one that has seen nothing at all tells (-inf, 0)
        share = logits[:, p::3] if p < 3 else torch.full((rows, 1), float("-inf"))
        sums[p, :rows, 0] = share.amax(1)
        sums[p, :rows, 1] = (share - share.amax(1).clamp_min(-99.0)[:, None]).exp().sum(1)
    scales = torch.tensor([0.5, 4.0, 1.0])  # powers of two: to the last bit
    kept = logits / scales[:, None] if scaled else logits
    stored = torch.cat([kept[:, c : c + width].flatten() for c in range(0, vocab_size, width)])
    ids = torch.zeros((rows, k), dtype=torch.int32, device=device)
    values, lse = torch.zeros((rows, k), device=device), torch.zeros(rows, device=device)
    sizes = {"BV": width, "C_PAD": 4, "P_PAD": 8, "PACK": pack, "LANED": False, "K": k, "K_PAD": 8}
    inputs = (tops.to(device), sums.to(device), banned.to(device), lse, stored.to(device), scales.to(device))
    outputs = (values, ids, lse, rows, padded, programs, vocab_size)
    head_merge_kernel[(rows,)](*inputs, *outputs, **sizes, HAS_BANNED=has_banned, SCALED=scaled, OVERLAP=False)
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
