import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.checks import LIMITS
from kernels.compile_ahead import Job
from kernels.linear_checks import (
    SPECIALIZED_QKV,
    LinearCase,
    check_qkv_linear,
    check_small_linear,
    linear_inputs,
    specialized_cases,
)
from kernels.small_linear import LinearTiles, quantize_int8, small_linear
from kernels.small_linear.jobs import linear_jobs
from kernels.small_linear.launches import OUT, QKV, check_specialized
from kernels.tile_configs import CONFIG_ROOT

TILES = LinearTiles(64, 128, 32, stages=4, overlap=True, specialized=True)
CASES = specialized_cases()


@pytest.fixture(scope="module")
def hopper(cuda: torch.device, compile_first: Callable[[list[Job]], None]) -> torch.device:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.x")
    jobs: dict[str, Job] = {}
    for dtype in (torch.bfloat16, torch.float16):
        for c in CASES:
            assert c.tiles is not None
            for job in linear_jobs(c.n, c.k, c.tiles, dtype, norm=c.norm, relu=c.relu, mode=int(c.residual), hopper=True):
                jobs[repr(job)] = job
    compile_first(list(jobs.values()))
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gpu_matches_fp64(case: LinearCase, dtype: torch.dtype, hopper: torch.device) -> None:
    assert check_small_linear(case, hopper, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SPECIALIZED_QKV, ids=str)
def test_gpu_keys_and_values_match_fp64(
    case: tuple[int, int, int, LinearTiles], dtype: torch.dtype, hopper: torch.device
) -> None:
    rows, d, k, tiles = case
    assert check_qkv_linear(rows, d, k, tiles, hopper, dtype) <= LIMITS[dtype]


@pytest.mark.gpu
def test_gpu_fp16_saturates_and_nan_stays_in_its_row(hopper: torch.device) -> None:
    x, weight = torch.full((3, 128), 100.0).half().to(hopper), torch.full((64, 128), 60.0).half().to(hopper)
    weight[1] = -60.0
    x[1, 5] = float("nan")
    out = small_linear(x, weight, tiles=TILES)
    assert out[0, :2].tolist() == out[2, :2].tolist() == [64512.0, -64512.0]
    assert out[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [TILES, replace(TILES, br=64), replace(TILES, fuse_norm=False)], ids=str)
def test_gpu_overlapping_maps_wait_for_each_other(tiles: LinearTiles, hopper: torch.device) -> None:
    """A chain x += W1 x', x' = norm(x) W2, captured and replayed on changing inputs, has the bits of calls one by one."""
    rows, d = 70, 1024
    maps = [linear_inputs(LinearCase(rows, d, d, norm=i % 2 == 1), hopper, torch.bfloat16, seed=i) for i in range(6)]
    weights = [m.map() for m in maps]
    x, y = (torch.empty(rows, d, dtype=torch.bfloat16, device=hopper) for _ in range(2))

    def chain(of: LinearTiles, pause: bool) -> None:
        for index, (weight, bias) in enumerate(weights):
            if index % 2:
                small_linear(x, weight, bias, out=y, tiles=of)
            else:
                small_linear(y, weight, bias, residual=x, tiles=of)
            if pause:
                torch.cuda.synchronize()

    generator = torch.Generator(hopper).manual_seed(0)
    starts = [torch.randn(2, rows, d, device=hopper, generator=generator).bfloat16() for _ in range(5)]
    truths = []
    for first, second in starts:
        x.copy_(first)
        y.copy_(second)
        chain(replace(tiles, overlap=False), pause=True)
        truths.append((x.clone(), y.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(tiles, pause=False)
    for turn in range(200):
        first, second = starts[turn % 5]
        x.copy_(first)
        y.copy_(second)
        graph.replay()
        assert torch.equal(x, truths[turn % 5][0])
        assert torch.equal(y, truths[turn % 5][1])


COMPILE = """
import torch
from kernels.compile_ahead import compile_kernel
from kernels.small_linear import LinearTiles
from kernels.small_linear.jobs import linear_jobs
for bn, br in ((128, 32), (64, 64)):
    tiles = LinearTiles(bn, 128, br, stages=4, prefetch=True, overlap=True, specialized=True)
    print("KERNEL", compile_kernel(linear_jobs(1024, 1024, tiles, torch.bfloat16, norm=True, hopper=True)[0], 90).asm["ptx"])
"""


def test_weights_are_asked_for_before_the_wait_and_rows_after_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=True)
    features_wide, rows_wide = found.stdout.split("KERNEL")[1:]
    assert "wgmma.mma_async.sync.aligned.m64n32k16" in features_wide
    assert "wgmma.mma_async.sync.aligned.m64n64k16" in rows_wide
    for ptx in (features_wide, rows_wide):
        assert ptx.count("griddepcontrol.wait") == 2  # of the loading warp, and of the others, who read the rest
        producer = ptx[ptx.index("cp.async.bulk.tensor") :]
        before, after = producer.split("griddepcontrol.wait")[:2]
        weights, rest = (re.findall(r"cp\.async\.bulk\.tensor\S* \[%r\d+\], \[(%rd\d+)", part) for part in (before, after))
        assert len(weights) == 8  # four stages, 128 bytes wide each
        assert len(set(weights)) == len(set(rest[:8])) == 1
        assert weights[0] != rest[0]
        assert "cp.async.bulk.prefetch.L2" in before


def test_tiles_that_the_kernel_cannot_run_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"bn": 32},
        {"bk": 32},
        {"bk": 512},
        {"br": 4, "bn": 4},
        {"warps": 2},
        {"stages": 1},
        {"split": 2},
    ]
    for change in [*bad, {"library": True}, {"br": 64, "gram": True}]:
        with pytest.raises(ValueError, match=r"specialized tiles|choose"):
            replace(TILES, **change)


def test_operands_that_it_does_not_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(3, 256).half(), torch.zeros(192, 256).half()
    with pytest.raises(ValueError, match=r"need bf16 or fp16 rows and weights on compute capability 9\.x"):
        small_linear(x, weight, tiles=TILES)
    monkeypatch.setattr("kernels.small_linear.launches.major", lambda _: 9)
    check_specialized(x, weight, OUT, TILES)
    check_specialized(x, weight, QKV, TILES)
    for rows, matrix, mode, message in (
        (x.float(), weight.float(), OUT, "need bf16 or fp16"),
        (x, quantize_int8(weight), OUT, "need bf16 or fp16"),
        (x, torch.zeros(96, 256).half(), OUT, "do not divide 96 and 256"),
        (x, torch.zeros(128, 192).half(), OUT, "do not divide 128 and 192"),
        (x, torch.zeros(96, 256).half(), QKV, "do not divide 32 and 256"),
        (torch.zeros(3 * 256 + 1).half()[1:].view(3, 256), weight, OUT, "multiples of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            check_specialized(rows, matrix, mode, TILES)


def test_every_stored_choice_serves_its_shape_and_fits_a_multiprocessor() -> None:
    found = 0
    for path in sorted(CONFIG_ROOT.glob("*/small_linear.json")):
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            tiles, shape = LinearTiles(**entry["choice"]), entry["shape"]
            if not tiles.specialized:
                continue
            found += 1
            n, k = shape["n"], shape["k"]
            features = n // 3 if n == 3 * k else n
            assert features % tiles.bn == 0
            assert k % tiles.bk == 0
            assert shape.get("bits") == 16 or "int8_rows" in shape
            size = 1 if "int8_rows" in shape else 2
            ring = min(tiles.stages, k // tiles.bk) * (tiles.bn + tiles.br) * tiles.bk * size
            assert ring + tiles.bn * tiles.br * 4 // 4 + 1024 <= 232448
    assert found > 0
