"""Benchmark of the linear maps of a decoder layer, and of the embedding. R rows, N output features, K inputs, D d_model.

Weights are in rotation, more of them than L2 holds: every call finds its own cold, as a layer of a real step does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from kernels.add_layernorm import add_layernorm_int8_reference
from kernels.bench_rows import Machine, Row
from kernels.embed import embed, embed_reference
from kernels.quantized_rows import QuantizedRows
from kernels.small_linear import (
    FoldedLinear,
    Int8Linear,
    LinearScratch,
    LinearTiles,
    fold_norm,
    qkv_linear,
    qkv_linear_reference,
    quantize_int8,
    small_linear,
    small_linear_reference,
)
from kernels.testing import graph_time_us, relative_error

LINEAR_LIMIT = 1e-2
_COLD_BYTES = 160 << 20  # weights in rotation: well above an L2 of 60 MB
_POSITIONS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear map of a decoder layer and what is fused with it. int8_rows: the norm is taken by a launch before, which
    leaves int8 rows for int8 weights."""

    name: str
    n: int
    k: int
    norm: bool = False
    relu: bool = False
    residual: bool = False
    cache: bool = False
    int8_rows: bool = False


def layer_shapes(d: int) -> tuple[LinearShape, ...]:
    """The five kinds in a layer of d_model D and a dense feed-forward of 4 D."""
    return (
        LinearShape("qkv", 3 * d, d, norm=True, cache=True),
        LinearShape("out", d, d, residual=True),
        LinearShape("cross q", d, d, norm=True),
        LinearShape("ffn1", 4 * d, d, norm=True, relu=True),
        LinearShape("ffn2", d, 4 * d, residual=True),
    )


def int8_rows_shapes(d: int) -> tuple[LinearShape, ...]:
    """Those of them behind a norm, with int8 rows."""
    return tuple(dataclasses.replace(shape, int8_rows=True) for shape in layer_shapes(d) if shape.norm)


LINEAR_SHAPES = (*layer_shapes(1024), *layer_shapes(2048))


@dataclasses.dataclass(frozen=True, slots=True)
class LinearBed:
    """Weights of one shape on the GPU, as many as make each call find its own cold; bits 16 (bf16) or 8.

    maps: weight and bias as the op takes them, the norm folded in; floats: what torch multiplies by, shared where nothing
    was folded or quantized.
    """

    shape: LinearShape
    bits: int
    maps: list[tuple[torch.Tensor | Int8Linear | FoldedLinear, torch.Tensor | None]]
    floats: list[torch.Tensor]
    bias: torch.Tensor
    norm: tuple[torch.Tensor, torch.Tensor, float] | None

    @classmethod
    def build(cls, shape: LinearShape, bits: int) -> LinearBed:
        """Random weights in bf16 or quantized to int8."""
        generator = torch.Generator("cuda").manual_seed(shape.n + shape.k)
        copies = min(64, max(8, -(-_COLD_BYTES * 8 // (shape.n * shape.k * bits))))

        def draw(*sizes: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(sizes, device="cuda", generator=generator) * scale).bfloat16()

        norm = (draw(shape.k, scale=0.2) + 1, draw(shape.k), 1e-5) if shape.norm else None
        bias = draw(shape.n)
        floats = [draw(shape.n, shape.k, scale=shape.k**-0.5) for _ in range(copies)]
        maps: list[tuple[torch.Tensor | Int8Linear | FoldedLinear, torch.Tensor | None]] = []
        for weight in floats:
            if norm is not None:
                maps.append((fold_norm(weight, bias, *norm, int8=bits == 8), None))
            else:
                maps.append((weight if bits == 16 else quantize_int8(weight), bias))
        return cls(shape, bits, maps, floats, bias, norm)

    def point(self, rows: int) -> LinearPoint:
        """Inputs for R rows and the truth of the first call."""
        shape, generator = self.shape, torch.Generator("cuda").manual_seed(rows)
        x = torch.randn(rows, shape.k, device="cuda", generator=generator).bfloat16()
        result = torch.randn(rows, shape.n // 3 if shape.cache else shape.n, device="cuda", generator=generator).bfloat16()
        heads = max(1, shape.k // 64)
        cells = torch.zeros(rows, _POSITIONS, 2, heads, shape.k // heads, device="cuda", dtype=torch.bfloat16)
        cell_rows = torch.randperm(rows, device="cuda", generator=generator).int()
        positions = torch.randint(0, _POSITIONS, (rows,), device="cuda", generator=generator, dtype=torch.int32)
        # for any tiles: 16 parts of K, tiles of 16 x 16
        scratch = LinearScratch(
            torch.empty(2 * rows, device="cuda"),
            torch.empty(rows * shape.n, device="cuda", dtype=torch.bfloat16),
            torch.empty(16 * rows * (shape.n + 2), device="cuda"),
            torch.zeros(-(-rows // 16) * -(-shape.n // 16), device="cuda", dtype=torch.int32),
        )
        cache = (cells, cell_rows, positions) if shape.cache else None
        return LinearPoint(self, x, result, cache, scratch)


@dataclasses.dataclass(frozen=True)  # no slots: `truth` is cached
class LinearPoint:
    """One bed at one number of rows. result: the residual, or where the result goes; cache: cells, rows, positions."""

    bed: LinearBed
    x: torch.Tensor
    result: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    scratch: LinearScratch

    def run(self, index: int, tiles: LinearTiles | None, result: torch.Tensor) -> torch.Tensor:
        """The op with weight `index`."""
        shape, (weight, bias) = self.bed.shape, self.bed.maps[index]
        x = self.quantized if shape.int8_rows else self.x
        if self.cache is not None:
            return qkv_linear(x, weight, bias, *self.cache, q_out=result, tiles=tiles, scratch=self.scratch)
        return small_linear(
            x,
            weight,
            bias,
            relu=shape.relu,
            residual=result if shape.residual else None,
            out=None if shape.residual else result,
            tiles=tiles,
            scratch=self.scratch,
        )

    @functools.cached_property
    def quantized(self) -> QuantizedRows:
        """The rows as the norm's launch leaves them for a folded norm."""
        return add_layernorm_int8_reference(self.x, None, None, None)[1]

    @functools.cached_property
    def truth(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Result and cells of the first call, from fp64."""
        shape, (weight, bias) = self.bed.shape, self.bed.maps[0]
        x = self.quantized if shape.int8_rows else self.x
        if self.cache is not None:
            return qkv_linear_reference(x, weight, bias, *self.cache)
        residual, dtype = self.result if shape.residual else None, self.result.dtype
        return small_linear_reference(x, weight, bias, relu=shape.relu, residual=residual, out_dtype=dtype), None

    @functools.cached_property
    def cell_index(self) -> torch.Tensor:
        """int64[R]: the cells as torch's index_copy_ wants them."""
        assert self.cache is not None
        return (self.cache[1] * _POSITIONS + self.cache[2]).long()

    def error(self, tiles: LinearTiles | None) -> float:
        """Error of the first call against fp64, over poisoned output."""
        true_result, true_cells = self.truth
        start = self.result.clone() if self.bed.shape.residual else torch.full_like(self.result, float("nan"))
        error = relative_error(self.run(0, tiles, start), true_result)
        if self.cache is not None and true_cells is not None:
            error = max(error, relative_error(self.cache[0], true_cells))
            self.cache[0].zero_()
        return error

    def time_us(self, tiles: LinearTiles | None) -> float:
        """Microseconds of a call with cold weights, all calls in one graph."""
        spare = self.result.clone()
        return graph_time_us([functools.partial(self.run, i, tiles, spare) for i in range(len(self.bed.maps))])

    def eager(self, index: int, result: torch.Tensor) -> None:
        """The same in torch, as an eager engine writes it."""
        bed, weight = self.bed, self.bed.floats[index]
        x = self.x if bed.norm is None else functional.layer_norm(self.x, (self.x.shape[1],), *bed.norm)
        y = functional.linear(x, weight, bed.bias)
        if bed.shape.relu:
            y = y.relu_()
        if bed.shape.residual:
            result.add_(y)
        if self.cache is not None:
            d = self.x.shape[1]
            self.cache[0].view(-1, 2 * d).index_copy_(0, self.cell_index, y[:, d:])

    def anchors_us(self) -> dict[str, float]:
        """torch: what the op replaces; gemm: torch's GEMM with bias alone."""
        spare, floats = self.result.clone(), self.bed.floats
        eager = [functools.partial(self.eager, i, spare) for i in range(len(floats))]
        bare: list[Callable[[], object]] = [functools.partial(functional.linear, self.x, w, self.bed.bias) for w in floats]
        return {"torch": graph_time_us(eager), "gemm": graph_time_us(bare)}

    @property
    def bytes_touched(self) -> int:
        """Weights, rows in, results out (a residual is read too), each once."""
        shape, rows = self.bed.shape, self.x.shape[0]
        out = rows * shape.n * 2 * (2 if shape.residual else 1)
        return shape.n * shape.k * self.bed.bits // 8 + rows * shape.k * (1 if shape.int8_rows else 2) + out


def small_linear_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Every linear map of a layer, bf16 and int8 weights, and int8 rows behind norms; torch beside them."""
    del machine
    for plain in LINEAR_SHAPES:
        anchors: dict[int, dict[str, float]] = {}
        for bits, kind in ((16, "bf16"), (8, "int8"), (8, "int8 rows"))[: 3 if plain.norm else 2]:
            shape = dataclasses.replace(plain, int8_rows=kind == "int8 rows")
            bed = LinearBed.build(shape, bits)
            for rows in (1, 64, 320) if quick else (1, 4, 16, 64, 128, 320, 1024):
                point = bed.point(rows)
                if bits == 16:
                    anchors[rows] = point.anchors_us()
                error = point.error(None)
                us = point.time_us(None) if error <= LINEAR_LIMIT else 0.0
                name = f"{shape.name} {shape.k}->{shape.n} {kind} R={rows}"
                flops = 2.0 * rows * shape.n * shape.k
                yield Row(
                    "small_linear", name, us, error, LINEAR_LIMIT, point.bytes_touched, flops, anchors_us=anchors[rows]
                )


def embed_rows(machine: Machine, quick: bool) -> Iterator[Row]:
    """Embedding lookup of a decode step; the check is for equal bits."""
    del machine
    for d, vocabulary in ((1024, 128_000), (2048, 256_256)):
        generator = torch.Generator("cuda").manual_seed(d)
        table = torch.randn(vocabulary, d, device="cuda", generator=generator, dtype=torch.bfloat16)
        sines = torch.randn(1026, d, device="cuda", generator=generator, dtype=torch.bfloat16)
        for rows in (1, 320) if quick else (1, 64, 320, 4096):
            yield _embed_row(table, sines, rows, generator)


def _embed_row(table: torch.Tensor, sines: torch.Tensor, rows: int, generator: torch.Generator) -> Row:
    (vocabulary, d), copies = table.shape, 32
    ids = [torch.randint(0, vocabulary, (rows,), device="cuda", generator=generator).int() for _ in range(copies)]
    positions = torch.randint(0, 1024, (rows,), device="cuda", generator=generator).int()
    out = table.new_empty(rows, d)
    options = {"scale": math.sqrt(d), "pad_token_id": 1}
    calls = [functools.partial(embed, i, positions, table, sines, out=out, **options) for i in ids]  # type: ignore[arg-type]
    truth = embed_reference(ids[0], positions, table, sines, **options)  # type: ignore[arg-type]
    error = 0.0 if torch.equal(calls[0](), truth) else 1.0

    def eager(index: int) -> torch.Tensor:
        own = torch.where(ids[index] == 1, 1, positions + 2)
        return table.index_select(0, ids[index]) * math.sqrt(d) + sines.index_select(0, own)

    us = graph_time_us(calls) if error == 0.0 else 0.0
    anchor = graph_time_us([functools.partial(eager, i) for i in range(copies)])
    return Row("embed", f"D={d} R={rows}", us, error, 0.0, rows * d * 2 * 3, anchors_us={"torch": anchor})
