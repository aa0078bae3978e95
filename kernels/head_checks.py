"""`head_topk` against torch in fp64, one case at a time; run by kernels.checks on a GPU and by pytest on either device.

R rows, D features, V vocabulary, k tokens a row.
"""

from __future__ import annotations

import dataclasses

import torch

from kernels.compile_ahead import Job
from kernels.head_topk import HeadTiles, TopTokens, head_topk
from kernels.head_topk.jobs import head_jobs
from kernels.head_topk.tiles import default_tiles
from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.quantized_rows import QuantizedRows, quantize_rows

# Largest error of a log-probability, absolute: the operands are taken as they are, and products are added in fp32.
HEAD_LIMIT = 2e-4
_EXTRA_COLUMNS = 3  # of the scratch: a row of logits need not be aligned


@dataclasses.dataclass(frozen=True, slots=True)
class HeadCase:
    """One call: sizes, bits of the weight (8 or the activations' own, 16), tiles (None: those a user gets), int8_rows: rows
    as `QuantizedRows`, whatever dtype is asked for."""

    num_rows: int
    num_features: int
    vocab_size: int
    k: int
    bits: int = 16
    tiles: HeadTiles | None = None
    int8_rows: bool = False

    @property
    def name(self) -> str:
        """Readable id."""
        t = self.tiles
        tiles = (
            f"v{t.block_vocab}.r{t.block_rows}+{t.extra_rows}.f{t.block_features}{'-gated' * t.gated}{'-tma' * t.tma}"
            f"{'-online' * t.online}"
            if t
            else "default"
        )
        return (
            f"R{self.num_rows}-D{self.num_features}-V{self.vocab_size}-k{self.k}-b{self.bits}{'x8' * self.int8_rows}-{tiles}"
        )

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the rows' numbers in memory, when the case runs in `dtype`."""
        return torch.int8 if self.int8_rows else dtype


SMALL_HEADS = (
    HeadCase(1, 32, 63, 1, tiles=HeadTiles(16, 16, block_features=32)),
    HeadCase(3, 48, 65, 16, tiles=HeadTiles(32, 16, block_features=32, gated=True)),
    HeadCase(2, 40, 257, 17, tiles=HeadTiles(64, 16, block_features=16, gated=True)),
    HeadCase(3, 64, 128, 8, bits=8, tiles=HeadTiles(64, 16)),
    HeadCase(3, 33, 129, 2, bits=8, tiles=HeadTiles(64, 16, block_features=32)),
    HeadCase(34, 32, 127, 2, tiles=HeadTiles(64, 32, 16, block_features=32, slice_rows=16, gated=True, tma=True)),
    HeadCase(2, 24, 18, 17, tiles=HeadTiles(16, 16, block_features=16)),
    HeadCase(2, 32, 100, 2),
    HeadCase(3, 33, 129, 16, bits=8, tiles=HeadTiles(64, 16, block_features=32), int8_rows=True),
    HeadCase(
        34, 48, 127, 2, bits=8, tiles=HeadTiles(64, 32, 16, block_features=32, slice_rows=16, gated=True), int8_rows=True
    ),
    HeadCase(2, 32, 100, 8, bits=8, int8_rows=True),
)

LARGE_HEADS = tuple(
    HeadCase(rows, features, vocab, k, bits, tiles)
    for bits in (16, 8)
    for features, vocab in ((1024, 32001), (2048, 8191), (96, 8129))
    for rows, k, tiles in (
        (1, 2, None),
        (3, 17, HeadTiles(64, 16, block_features=64, stages=4, tma=True)),
        (17, 8, HeadTiles(128, 32, block_features=64)),
        (64, 16, HeadTiles(128, 64, gated=True)),
        (161, 8, HeadTiles(256, 128, 32, warps=8, gated=True, tma=True)),
        (320, 16, None),
        (320, 10, HeadTiles(128, 128, 32, warps=8, gated=True)),
        (1024, 2, HeadTiles(128, 128, warps=8, gated=True)),
    )
    if bits == 16 or tiles is None or not tiles.tma
) + tuple(
    HeadCase(rows, features, vocab, k, 8, tiles, int8_rows=True)
    for features, vocab in ((1024, 32001), (2048, 8191), (112, 8129))
    for rows, k, tiles in (
        (1, 2, None),
        (17, 17, HeadTiles(128, 32, block_features=64)),
        (320, 8, None),
        (161, 10, HeadTiles(128, 128, 32, warps=8, gated=True)),
    )
)


def _hopper_heads(
    cases: tuple[tuple[int, int, int, int, bool, tuple[int, int, int, int, int, int]], ...],
    *,
    int8_rows: bool = False,
    online: bool = False,
) -> tuple[HeadCase, ...]:
    """Of rows, features, vocabulary, k, gated, and the numbers that tiles begin with."""
    return tuple(
        HeadCase(
            rows,
            features,
            vocab,
            k,
            8 if int8_rows else 16,
            HeadTiles(*tiles, specialized=True, tma=True, gated=gated, online=online),
            int8_rows=int8_rows,
        )
        for rows, features, vocab, k, gated, tiles in cases
    )


# Hopper's own kernels; what they leave over at every edge: rows, logits (an empty last half), features, groups of thresholds
HOPPER_HEADS = (
    *_hopper_heads(
        (
            (1, 1024, 32001, 2, True, (128, 128, 0, 64, 4, 6)),
            (64, 2048, 8191, 17, False, (256, 128, 0, 64, 4, 4)),
            (129, 96, 8129, 8, True, (128, 128, 64, 64, 4, 5)),
            (161, 112, 8129, 8, True, (256, 128, 64, 64, 4, 4)),
            (320, 1024, 32001, 16, True, (128, 256, 64, 64, 4, 4)),
            (320, 96, 8193, 8, False, (128, 256, 64, 32, 4, 8)),
            (511, 2048, 8191, 10, True, (128, 256, 0, 64, 4, 4)),
            (1024, 64, 320, 1, True, (128, 256, 64, 64, 4, 4)),
        )
    ),
    *_hopper_heads(
        (
            (1, 1024, 32001, 2, True, (128, 128, 0, 64, 4, 6)),
            (96, 2048, 8191, 16, True, (128, 128, 0, 64, 4, 6)),
            (129, 96, 8129, 8, True, (128, 128, 64, 64, 4, 7)),
            (255, 112, 8193, 17, False, (128, 256, 0, 64, 4, 4)),
            (320, 1024, 32001, 8, True, (128, 256, 64, 64, 4, 6)),
            (320, 96, 8193, 8, False, (128, 256, 64, 32, 4, 8)),
            (311, 2048, 8191, 10, True, (128, 256, 64, 64, 4, 6)),
            (1024, 64, 320, 1, True, (128, 256, 64, 64, 4, 6)),
        ),
        online=True,
    ),
    *_hopper_heads(
        (
            (1, 1024, 32001, 2, True, (128, 128, 0, 128, 4, 3)),
            (64, 2048, 8191, 17, False, (256, 128, 0, 128, 4, 4)),
            (129, 112, 8129, 8, True, (128, 128, 64, 64, 4, 5)),
            (161, 96, 8193, 8, False, (256, 128, 64, 32, 4, 8)),
            (320, 1024, 32001, 16, True, (128, 256, 64, 128, 4, 4)),
            (511, 2048, 8191, 10, True, (128, 256, 0, 128, 4, 4)),
            (1024, 64, 320, 1, True, (128, 256, 64, 64, 4, 4)),
        ),
        int8_rows=True,
    ),
    *_hopper_heads(
        (
            (1, 1024, 32001, 2, True, (128, 128, 0, 128, 4, 7)),
            (96, 2048, 8191, 16, True, (128, 128, 0, 128, 4, 7)),
            (129, 112, 8129, 8, True, (128, 128, 64, 128, 4, 7)),
            (255, 96, 8193, 17, False, (128, 256, 0, 128, 4, 6)),
            (320, 1024, 32001, 8, True, (128, 256, 64, 128, 4, 6)),
            (320, 96, 8193, 8, False, (128, 256, 64, 64, 4, 11)),
            (311, 2048, 8191, 10, True, (128, 256, 64, 128, 4, 6)),
            (1024, 64, 320, 1, True, (128, 256, 64, 128, 4, 6)),
            (129, 96, 170001, 8, True, (128, 128, 64, 128, 4, 7)),  # a step a tile: 11 tiles a program in 8 slots of scales
        ),
        int8_rows=True,
        online=True,
    ),
)


def large_heads(device: torch.device, dtype: torch.dtype) -> tuple[HeadCase, ...]:
    """The large cases that this device can run in `dtype`."""
    hopper = dtype != torch.float32 and torch.cuda.get_device_capability(device)[0] == 9
    return (*LARGE_HEADS, *HOPPER_HEADS) if hopper else LARGE_HEADS


def head_inputs(
    case: HeadCase, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor | QuantizedRows, torch.Tensor | Int8Linear, torch.Tensor]:
    """x, the head with NaN (int8: huge) padding rows, and one banned token a row (for the first rows their best one)."""
    generator = torch.Generator(device).manual_seed(case.num_rows)
    x = torch.randn(case.num_rows, case.num_features, generator=generator, device=device).to(dtype)
    stored = -(-case.vocab_size // 64) * 64
    matrix = torch.randn(stored, case.num_features, generator=generator, device=device) * 3 * case.num_features**-0.5
    banned = torch.randint(-1, case.vocab_size, (case.num_rows,), generator=generator, device=device, dtype=torch.int32)
    if case.bits == 8:
        head = quantize_int8(matrix)
        head.codes[case.vocab_size :] = 127
        head.scales[case.vocab_size :] = 1e30
        rows: torch.Tensor | QuantizedRows = quantize_rows(x) if case.int8_rows else x
        best = (_floats(rows, torch.float64) @ head.dequantized(torch.float64)[: case.vocab_size].T).argmax(1)
        banned[: case.num_rows // 2 + 1] = best[: case.num_rows // 2 + 1].int()
        return rows, head, banned
    weight = matrix.to(dtype)
    weight[case.vocab_size :] = float("nan")
    best = (x.double() @ weight.double()[: case.vocab_size].T).argmax(1)
    banned[: case.num_rows // 2 + 1] = best[: case.num_rows // 2 + 1].int()
    return x, weight, banned


def _floats(x: torch.Tensor | QuantizedRows, dtype: torch.dtype) -> torch.Tensor:
    return x.dequantize(dtype) if isinstance(x, QuantizedRows) else x.to(dtype)


def head_error(
    out: TopTokens,
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | Int8Linear,
    vocab_size: int,
    banned: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Largest error of a value or log-sum-exp against `dtype`; inf for a token that may not stand there.

    Tokens are judged by their own true log-probability: two that differ by less than rounding may change places.
    """
    matrix = weight.dequantized(dtype) if isinstance(weight, Int8Linear) else weight.to(dtype)
    logits = _floats(x, dtype) @ matrix[:vocab_size].T
    lse = torch.logsumexp(logits, 1)
    ids = out.token_ids.long()
    if ((ids < 0) | (ids >= vocab_size)).any() or (ids.sort(1).values.diff(dim=1) == 0).any():
        return float("inf")
    if (out.values.diff(dim=1) > 0).any() or (banned is not None and (out.token_ids == banned[:, None]).any()):
        return float("inf")
    if banned is not None:
        logits[torch.arange(len(banned), device=x.device), banned.clamp_min(0).long()] += torch.where(
            banned >= 0, float("-inf"), 0.0
        )
    best = torch.topk(logits, ids.shape[1]).values - lse[:, None]
    own = logits.gather(1, ids) - lse[:, None]
    return max(float((a - b).abs().max()) for a, b in ((out.values, best), (out.values, own), (out.log_sum_exp, lse)))


def check_head_case(case: HeadCase, device: torch.device, dtype: torch.dtype) -> float:
    """Error over poisoned scratch and outputs, with and without banned tokens; inf when two runs differ in a bit."""
    x, weight, banned = head_inputs(case, device, dtype)
    worst = 0.0
    for ban in (banned, None):
        results = []
        for _ in range(2 if device.type == "cuda" else 1):  # the interpreter has no timing that could matter
            out = TopTokens(
                torch.full((case.num_rows, case.k), float("nan"), device=device),
                torch.full((case.num_rows, case.k), -7, dtype=torch.int32, device=device),
                torch.full((case.num_rows,), float("nan"), device=device),
            )
            scratch = torch.full((case.num_rows + 1, case.vocab_size + _EXTRA_COLUMNS), float("nan"), device=device)
            options = {"k": case.k, "vocab_size": case.vocab_size, "banned": ban, "tiles": case.tiles}
            results.append(head_topk(x, weight, logits_scratch=scratch, out=out, **options))  # type: ignore[arg-type]
        if not all(
            torch.equal(getattr(results[0], n), getattr(results[-1], n)) for n in ("values", "token_ids", "log_sum_exp")
        ):
            return float("inf")
        error = head_error(results[0], x, weight, case.vocab_size, ban)
        if not error <= worst:  # a NaN stays
            worst = error
    return worst


def head_check_jobs(dtype: torch.dtype) -> list[Job]:
    """Compile jobs of all cases, for `kernels.compile_ahead`."""
    return [
        job
        for c in (*SMALL_HEADS, *LARGE_HEADS, *(HOPPER_HEADS if dtype != torch.float32 else ()))
        for ban in (True, False)
        for job in head_jobs(
            c.num_features,
            c.vocab_size,
            c.k,
            c.bits,
            c.tiles or default_tiles(c.num_rows, c.row_dtype(dtype)),
            c.row_dtype(dtype),
            has_banned=ban,
        )
    ]


def failed_head_checks(device: torch.device, dtype: torch.dtype) -> list[str]:
    """One line for each case that fails on this device."""
    lines = []
    for case in (*SMALL_HEADS, *large_heads(device, dtype)):
        error = check_head_case(case, device, dtype)
        if not error <= HEAD_LIMIT:
            lines.append(f"FAILED head_topk {dtype} {case.name}: error {error:.2e}")
    return lines
