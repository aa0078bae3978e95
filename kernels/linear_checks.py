"""Checks of the small linear maps and of the embedding against their slow twins; run by kernels.checks and by pytest."""

from __future__ import annotations

import dataclasses
import math

import torch

from kernels.compile_ahead import Job
from kernels.embed import embed, embed_reference
from kernels.small_linear import (
    FoldedLinear,
    Int8Linear,
    LinearTiles,
    fold_norm,
    qkv_linear,
    qkv_linear_reference,
    quantize_int8,
    small_linear,
    small_linear_reference,
)
from kernels.small_linear.jobs import linear_jobs
from kernels.small_linear.tiles import default_tiles
from kernels.testing import relative_error


@dataclasses.dataclass(frozen=True, slots=True)
class LinearCase:
    """R rows, N features, K inputs; int8: quantized weight; norm: folded into it; relu, residual: what is fused.

    tiles None: by shape."""

    rows: int
    n: int
    k: int
    tiles: LinearTiles | None = None
    int8: bool = False
    norm: bool = False
    relu: bool = False
    residual: bool = False
    bias: bool = True

    @property
    def name(self) -> str:
        """Readable id."""
        flags = [f for f in ("int8", "norm", "relu", "residual", "bias") if getattr(self, f)]
        t = self.tiles
        tiles = "auto" if t is None else "library" if t.library else f"n{t.bn}k{t.bk}r{t.br}w{t.warps}s{t.stages}x{t.split}"
        parts = [] if t is None else ["statistics"] * (not t.fuse_norm) + ["specialized"] * t.specialized
        return "-".join([f"R{self.rows}-N{self.n}-K{self.k}", tiles, *parts, *flags])


def linear_cases(*, large: bool) -> list[LinearCase]:
    """Awkward sizes in every launch form; `large` (GPU) adds real sizes that an interpreter is too slow for."""
    tiles = [
        None,
        LinearTiles(16, 32, 16, stages=2),
        LinearTiles(32, 64, 32, fuse_norm=False),
        LinearTiles(16, 16, 16, split=3),
        LinearTiles(16, 128, 16, split=4),
        LinearTiles(64, 32, 16, prefetch=True),
        LinearTiles(16, 32, 64, gram=True),
        LinearTiles(4, br=1, warps=1),
        LinearTiles(8, br=4),
        LinearTiles(library=True),
    ]
    forms = [{}, {"norm": True, "relu": True}, {"norm": True}, {"residual": True}, {"relu": True, "residual": True}]
    cases = []
    for index, t in enumerate(tiles):
        for number, form in enumerate(forms):
            rows, n, k = ((1, 48, 64), (3, 33, 131), (17, 75, 96))[(index + number) % 3]
            int8 = (index + number) % 2 == 1 and not (t is not None and t.library)
            cases.append(LinearCase(rows, n, k, t, int8=int8, bias=number != 3, **form))
    cases += [LinearCase(1, 1, 1), LinearCase(5, 16, 7, norm=True), LinearCase(33, 17, 300, norm=True, int8=True)]
    if large:
        sizes = ((3072, 1024), (1024, 4096), (8192, 2048), (2048, 8192), (1000, 1032), (77, 1023))
        many = [
            None,
            LinearTiles(16, 256, 16, warps=2, stages=5, prefetch=True),
            LinearTiles(32, 128, 32, split=4, fuse_norm=False),
            LinearTiles(64, 128, 64, split=2),
            LinearTiles(128, 64, 128, warps=8),
            LinearTiles(32, 128, 16, warps=2, stages=6),
            LinearTiles(32, 128, 16, split=2, overlap=True),
            LinearTiles(16, 128, 16, split=16, warps=4),
            LinearTiles(64, 64, 64, gram=True, overlap=True),
            LinearTiles(128, 64, 64, split=2, gram=True),
            LinearTiles(4, br=1, warps=8, overlap=True),
            LinearTiles(8, br=4, warps=8, overlap=True),
            LinearTiles(library=True),
        ]
        for n, k in sizes:
            for rows in (1, 17, 64, 320, 1024):
                for t in many:
                    if t is not None and t.no_dot and rows > 64:
                        continue
                    int8 = (rows + n) % 2 == 1 and not (t is not None and t.library)
                    cases.append(LinearCase(rows, n, k, t, int8=int8, norm=k < 3000, relu=rows == 64, residual=n <= k))
    return cases


def specialized_cases() -> list[LinearCase]:
    """Hopper's own kernel, bf16 and fp16 only: either side wide, one step, fewer and more steps than stages, ragged rows."""
    tiles = [
        LinearTiles(64, 128, 16, stages=2, overlap=True, specialized=True),
        LinearTiles(64, 64, 32, stages=8, prefetch=True, overlap=True, specialized=True),
        LinearTiles(128, 256, 16, stages=2, warps=8, specialized=True),
        LinearTiles(64, 128, 64, stages=3, fuse_norm=False, overlap=True, specialized=True),
        LinearTiles(256, 64, 64, stages=4, warps=8, prefetch=True, overlap=True, specialized=True),
        LinearTiles(128, 64, 128, stages=4, warps=8, overlap=True, specialized=True),
        LinearTiles(64, 128, 64, stages=3, overlap=True, specialized=True),
    ]
    forms = [{}, {"norm": True, "relu": True}, {"norm": True}, {"residual": True}, {"relu": True, "residual": True}]
    cases = []
    for index, t in enumerate(tiles):
        for number, form in enumerate(forms):
            n, k = ((256, 256), (768, 1024), (1024, 4096))[(index + number) % 3]
            rows = (1, 15, 64, 130, 321)[(2 * index + number) % 5]
            cases.append(LinearCase(rows, n, k, t, bias=number != 3, **form))
    return cases


@dataclasses.dataclass(frozen=True, slots=True)
class LinearInputs:
    """Operands of one case."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: tuple[torch.Tensor, torch.Tensor, float] | None
    residual: torch.Tensor | None

    def map(self, *, int8: bool = False) -> tuple[torch.Tensor | Int8Linear | FoldedLinear, torch.Tensor | None]:
        """Weight and bias as the op takes them."""
        if self.norm is not None:
            return fold_norm(self.weight, self.bias, *self.norm, int8=int8), None
        return quantize_int8(self.weight) if int8 else self.weight, self.bias

    def truth(self, *, int8: bool = False, relu: bool = False) -> torch.Tensor:
        """fp64, rounded once: torch's layer norm and the map as it was before folding (int8: as stored)."""
        weight, bias = self.map(int8=int8)
        rows = self.x.double()
        if self.norm is not None and not int8:
            scale, shift, eps = self.norm
            rows = torch.nn.functional.layer_norm(rows, rows.shape[1:], scale.double(), shift.double(), eps)
            weight, bias = self.weight, self.bias
        return small_linear_reference(rows, weight, bias, relu=relu, residual=self.residual).to(self.x.dtype)


def linear_inputs(case: LinearCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LinearInputs:
    """Random operands; with a norm, rows of x lie far from zero and differ in size."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = draw(case.rows, case.k)
    if case.norm:
        x = x * (1 + torch.arange(case.rows, device=device)[:, None] % 5) + 20.0
    norm = ((draw(case.k) * 0.2 + 1).to(dtype), draw(case.k).to(dtype), 1e-5) if case.norm else None
    weight = (draw(case.n, case.k) * case.k**-0.5).to(dtype)
    bias = draw(case.n).to(dtype) if case.bias else None
    return LinearInputs(x.to(dtype), weight, bias, norm, draw(case.rows, case.n).to(dtype) if case.residual else None)


def check_small_linear(case: LinearCase, device: torch.device, dtype: torch.dtype) -> float:
    """Error against fp64; inf when two runs on a GPU differ in a bit. out is poisoned first."""
    inputs = linear_inputs(case, device, dtype)
    weight, bias = inputs.map(int8=case.int8)
    truth = inputs.truth(int8=case.int8, relu=case.relu)
    results = []
    for _ in range(2 if device.type == "cuda" else 1):  # the interpreter has no timing that could matter
        residual = None if inputs.residual is None else inputs.residual.clone()
        out = None if case.residual else torch.full_like(truth, float("nan"))
        results.append(small_linear(inputs.x, weight, bias, relu=case.relu, residual=residual, out=out, tiles=case.tiles))
    if not torch.equal(results[0], results[-1]):
        return float("inf")
    return relative_error(results[0], truth)


def check_qkv_linear(
    rows: int, d: int, k: int, tiles: LinearTiles | None, device: torch.device, dtype: torch.dtype, *, int8: bool = False
) -> float:
    """Larger error of queries and of cells written; inf when a cell of nobody was touched. Entries 0 and 1 share a cache
    row, about a fifth is inactive with NaN in x, four lie outside the cache."""
    generator = torch.Generator(device).manual_seed(rows)
    inputs = linear_inputs(LinearCase(rows, 3 * d, k, norm=True), device, dtype)
    weight, bias = inputs.map(int8=int8)
    heads = next(h for h in (4, 3, 1) if d % h == 0)
    guarded = torch.full((rows + 4, 5, 2, heads, d // heads), float("nan"), dtype=dtype, device=device)
    cells = guarded[1:-1]  # a write just past either end is seen
    cell_rows = torch.randperm(rows, generator=generator, device=device).int()
    positions = torch.randint(0, 5, (rows,), generator=generator, device=device, dtype=torch.int32)
    if rows > 5:
        cell_rows[1], positions[0], positions[1] = cell_rows[0], 1, 4
        cell_rows[2] = rows + 2
        positions[3] = 5
        positions[4] = -1
        cell_rows[5] = -1
    inactive = torch.rand(rows, generator=generator, device=device) < (0.2 if rows > 5 else 0.0)
    inactive[:6] = False
    cell_rows[inactive] = -1
    inputs.x[inactive] = float("nan")
    true_q, true_cells = qkv_linear_reference(inputs.x, weight, bias, cells, cell_rows, positions)
    q_out = torch.full_like(true_q, float("nan"))
    q = qkv_linear(inputs.x, weight, bias, cells, cell_rows, positions, q_out=q_out, tiles=tiles)
    if not torch.equal(cells.isnan(), true_cells.isnan()) or not guarded[[0, -1]].isnan().all():
        return float("inf")
    written = ~true_cells.isnan()
    active = ~inactive
    cell_error = relative_error(cells[written], true_cells[written]) if written.any() else 0.0
    return max(relative_error(q[active], true_q[active]), cell_error)


QKV_TILES = (
    None,
    LinearTiles(32, 32, 16),
    LinearTiles(16, 64, 16, split=2),
    LinearTiles(4, br=4, overlap=True),
    LinearTiles(library=True),
)
QKV_SIZES = ((1, 16, 32), (17, 21, 65), (9, 64, 48))
SPECIALIZED_QKV = (  # rows, D, K, tiles: for `check_qkv_linear` in 16 bits on Hopper
    (17, 64, 128, LinearTiles(64, 64, 16, stages=3, specialized=True)),
    (320, 1024, 1024, LinearTiles(128, 128, 64, stages=4, fuse_norm=False, overlap=True, specialized=True)),
    (96, 1024, 1024, LinearTiles(128, 128, 32, stages=4, prefetch=True, overlap=True, specialized=True)),
)


def check_embed(rows: int, d: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decoder and encoder forms give torch's bits, pad tokens and indices out of range included."""
    generator = torch.Generator(device).manual_seed(rows)
    table = torch.randn(50, d, generator=generator, device=device).to(dtype)
    position_table = torch.randn(20, d, generator=generator, device=device).to(dtype)
    ids = torch.randint(0, 50, (rows,), generator=generator, device=device, dtype=torch.int32)
    positions = torch.randint(0, 18, (rows,), generator=generator, device=device, dtype=torch.int32)
    position_rows = torch.randint(0, 20, (rows,), generator=generator, device=device, dtype=torch.int32)
    ids[0] = 1
    if rows > 3:
        ids[1], ids[2], positions[3] = -7, 50, 19
    same = True
    for indices in ((positions, None), (None, position_rows)):
        options = {"scale": math.sqrt(d), "pad_token_id": 1, "position_rows": indices[1]}
        out = torch.full((rows, d), float("nan"), dtype=dtype, device=device)
        truth = embed_reference(ids, indices[0], table, position_table, **options)  # type: ignore[arg-type]
        same &= torch.equal(embed(ids, indices[0], table, position_table, out=out, **options), truth)  # type: ignore[arg-type]
    return same


EMBED_SIZES = ((1, 32), (5, 100), (17, 1500))


def linear_check_jobs(dtype: torch.dtype) -> list[Job]:
    """Compile jobs of what `linear_failures` runs on a Hopper GPU, for kernels.compile_ahead before CUDA starts."""
    jobs: list[Job] = []
    for c in linear_cases(large=True):
        tiles = c.tiles or default_tiles(c.n, c.k, c.rows, 8 if c.int8 else 16, fixed=False)
        options = {"norm": c.norm, "relu": c.relu, "mode": int(c.residual), "int8": c.int8, "hopper": True}
        jobs += linear_jobs(c.n, c.k, tiles, dtype, **options)  # type: ignore[arg-type]
    if dtype != torch.float32:
        for c in specialized_cases():
            options = {"norm": c.norm, "relu": c.relu, "mode": int(c.residual), "hopper": True}
            jobs += linear_jobs(c.n, c.k, c.tiles, dtype, **options)  # type: ignore[arg-type]
    return list({repr(job): job for job in jobs}.values())


def linear_failures(device: torch.device, dtype: torch.dtype, limit: float) -> list[str]:
    """Every check of this module on a GPU; what failed, one line each."""
    failed = []
    hopper = dtype != torch.float32 and torch.cuda.get_device_capability(device)[0] == 9
    for case in linear_cases(large=True) + (specialized_cases() if hopper else []):
        error = check_small_linear(case, device, dtype)
        if not error <= limit:
            failed.append(f"small_linear {dtype} {case.name}: error {error:.2e}")
    for sizes in (*QKV_SIZES, (320, 1024, 1024), (64, 2048, 2048)):
        for tiles in QKV_TILES:
            for int8 in (False,) if tiles is not None and tiles.library else (False, True):
                error = check_qkv_linear(*sizes, tiles, device, dtype, int8=int8)
                if not error <= limit:
                    failed.append(f"qkv_linear {dtype} {sizes} {tiles} int8={int8}: error {error:.2e}")
    for rows, d, k, own in SPECIALIZED_QKV if hopper else ():
        error = check_qkv_linear(rows, d, k, own, device, dtype)
        if not error <= limit:
            failed.append(f"qkv_linear {dtype} {(rows, d, k)} {own}: error {error:.2e}")
    failed += [f"embed {dtype} {s}: bits differ" for s in (*EMBED_SIZES, (320, 2048)) if not check_embed(*s, device, dtype)]
    return failed
