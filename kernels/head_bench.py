"""Data, check and timing of `head_topk`, for its tuner and the bench. R rows, D features, V vocabulary, k tokens a row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from kernels.bench_rows import Machine, Row
from kernels.head_checks import HEAD_LIMIT, head_error
from kernels.head_topk import HeadTiles, TopTokens, head_topk, select_tiles
from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.quantized_rows import QuantizedRows, quantize_rows
from kernels.testing import graph_time_us

HEADS = ((128000, 1024), (256206, 2048))  # V, D: the paper's shape and NLLB-MoE 54B
HEAD_ROWS = (1, 64, 96, 128, 192, 256, 320, 384, 512)  # the engine's buckets
_DEVICE = torch.device("cuda")
_K = 8  # two tokens for each of four beams


@dataclasses.dataclass
class HeadBed:
    """One head in bf16 or int8 (several copies where one would stay in L2), its padding rows NaN or huge."""

    vocab_size: int
    num_features: int
    bits: int
    heads: list[torch.Tensor] | list[Int8Linear]

    @classmethod
    def build(cls, vocab_size: int, num_features: int, bits: int) -> HeadBed:
        """Random weights, about half a gigabyte at least."""
        generator = torch.Generator(_DEVICE).manual_seed(7)
        rows = -(-vocab_size // 64) * 64
        weight = torch.empty(rows, num_features, dtype=torch.bfloat16, device=_DEVICE)
        weight.normal_(0.0, 2 * num_features**-0.5, generator=generator)
        copies = max(1, (500 << 20) // (rows * num_features * bits // 8))
        if bits == 8:
            head = quantize_int8(weight)
            head.scales[vocab_size:] = 1e30
            return cls(vocab_size, num_features, bits, [Int8Linear(head.codes.clone(), head.scales) for _ in range(copies)])
        weight[vocab_size:] = float("nan")
        return cls(vocab_size, num_features, bits, [weight.clone() for _ in range(copies)])

    def point(self, num_rows: int, *, int8_rows: bool = False) -> HeadPoint:
        """Inputs for one number of rows; int8_rows (a bed of 8 bits): rows in int8, too."""
        generator = torch.Generator(_DEVICE).manual_seed(num_rows)
        shape = (num_rows, self.num_features)
        floats = [torch.randn(shape, generator=generator, device=_DEVICE).bfloat16() for _ in range(4)]
        xs = [quantize_rows(x) for x in floats] if int8_rows else floats
        banned = torch.full((num_rows,), 2, dtype=torch.int32, device=_DEVICE)
        scratch = torch.empty(num_rows, -(-self.vocab_size // 64) * 64, device=_DEVICE)
        return HeadPoint(self, xs, banned, scratch)


@dataclasses.dataclass
class HeadPoint:
    """One number of rows: inputs of every call in the graph, banned tokens, scratch."""

    bed: HeadBed
    xs: list[torch.Tensor] | list[QuantizedRows]
    banned: torch.Tensor
    scratch: torch.Tensor

    def call(self, index: int, tiles: HeadTiles | None) -> TopTokens:
        """The op, call `index` of the rotation."""
        head = self.bed.heads[index % len(self.bed.heads)]
        options = {"k": _K, "vocab_size": self.bed.vocab_size, "banned": self.banned, "logits_scratch": self.scratch}
        return head_topk(self.xs[index], head, tiles=tiles, **options)  # type: ignore[arg-type]

    def measure(self, tiles: HeadTiles, replays: int = 7) -> dict[str, Any]:
        """Check (NaN-poisoned scratch, against fp32, twice for equal bits), then time: error, repeatable, ok, us."""
        outputs = []
        for _ in range(2):
            self.scratch.fill_(float("nan"))
            outputs.append(self.call(0, tiles))
        same = all(
            torch.equal(getattr(outputs[0], n), getattr(outputs[1], n)) for n in ("values", "token_ids", "log_sum_exp")
        )
        error = head_error(outputs[0], self.xs[0], self.bed.heads[0], self.bed.vocab_size, self.banned, torch.float32)
        result: dict[str, Any] = {"error": error, "repeatable": same, "ok": error <= HEAD_LIMIT and same}
        if result["ok"]:
            result["us"] = graph_time_us(
                [functools.partial(self.call, i, tiles) for i in range(len(self.xs))], replays=replays
            )
        return result

    def row(self, anchors_us: dict[str, float]) -> Row:
        """Measure with the tiles that a user gets."""
        bed, num_rows = self.bed, len(self.banned)
        row_type = torch.int8 if isinstance(self.xs[0], QuantizedRows) else torch.bfloat16
        result = self.measure(select_tiles(num_rows, bed.num_features, bed.vocab_size, bed.bits, _DEVICE, row_type), 21)
        row_bytes = bed.num_features * row_type.itemsize + _K * 8
        touched = bed.vocab_size * bed.num_features * bed.bits // 8 + num_rows * row_bytes
        flops = 2.0 * num_rows * bed.vocab_size * bed.num_features
        kind = {(16, 2): "bf16", (8, 2): "int8", (8, 1): "int8 x int8 rows"}[bed.bits, row_type.itemsize]
        name = f"V={bed.vocab_size} D={bed.num_features} {kind} R={num_rows}"
        error = result["error"] if result["repeatable"] else float("inf")
        return Row("head_topk", name, result.get("us", 0.0), error, HEAD_LIMIT, touched, flops, 2, anchors_us)

    def matmul(self, index: int) -> torch.Tensor:
        """Torch's bf16 product over the padded vocabulary, nothing else; for beds of 16 bits."""
        weights = [head for head in self.bed.heads if isinstance(head, torch.Tensor)]
        floats = [x for x in self.xs if isinstance(x, torch.Tensor)]
        return floats[index] @ weights[index % len(weights)].T

    def matmul_us(self, replays: int = 9) -> float:
        """What the product alone takes."""
        return graph_time_us([functools.partial(self.matmul, i) for i in range(len(self.xs))], replays=replays)

    def anchors_us(self) -> dict[str, float]:
        """Torch in bf16: the matmul alone, and with log_softmax and topk behind it."""

        def all_of_it(index: int) -> torch.Tensor:
            logits = self.matmul(index)[:, : self.bed.vocab_size].float()
            return torch.log_softmax(logits, 1).topk(_K).values

        everything = graph_time_us([functools.partial(all_of_it, i) for i in range(len(self.xs))], replays=9)
        return {"matmul": self.matmul_us(), "matmul + log_softmax + topk": everything}


def head_topk_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Both heads in bf16, int8 and int8 with int8 rows at decode sizes; beside them torch's matmul alone, and with
    log_softmax and topk."""
    del machine
    for vocab_size, num_features in HEADS:
        anchors: dict[int, dict[str, float]] = {}
        for bits in (16, 8):
            bed = HeadBed.build(vocab_size, num_features, bits)
            for num_rows in (1, 320) if quick else HEAD_ROWS:
                point = bed.point(num_rows)
                if bits == 16:
                    anchors[num_rows] = point.anchors_us()
                yield point.row(anchors[num_rows])
                if bits == 8:
                    yield bed.point(num_rows, int8_rows=True).row(anchors[num_rows])
            del bed, point
            torch.cuda.empty_cache()
