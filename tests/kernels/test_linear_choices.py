from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.linear_checks import (
    LinearCase,
    linear_inputs,
)
from kernels.small_linear import (
    LinearTiles,
    fold_norm,
    linear_scratch,
    qkv_linear,
    quantize_int8,
    small_linear,
)
from kernels.small_linear.tiles import default_tiles, select_tiles


def test_fixed_tiles_do_not_look_at_the_rows(cpu: torch.device) -> None:
    for n, k in ((1024, 1024), (8192, 2048), (77, 33)):
        chosen = {select_tiles(n, k, rows, 16, cpu, norm=True, fixed=True) for rows in (1, 16, 17, 320, 4096)}
        assert len(chosen) == 1
        assert not chosen.pop().library  # a library may choose its order by the number of rows


@pytest.mark.parametrize("fused", [True, False])
def test_scratch_is_enough_and_semaphores_return_to_zero(
    fused: bool, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split_everything(*_: object, **__: object) -> LinearTiles:
        return LinearTiles(16, 16, 16, split=3, fuse_norm=fused)

    monkeypatch.setattr("kernels.small_linear.scratch.select_tiles", split_everything)
    monkeypatch.setattr("kernels.small_linear.launcher.select_tiles", split_everything)
    scratch = linear_scratch([(48, 64, True), (33, 100, True)], 20, torch.float32, cpu)
    for n, k, rows in ((48, 64, 20), (33, 100, 3), (48, 64, 17)):
        inputs = linear_inputs(LinearCase(rows, n, k, norm=True), cpu, torch.float32)
        got = small_linear(inputs.x, *inputs.map(), scratch=scratch)
        assert torch.equal(got, small_linear(inputs.x, *inputs.map()))
        assert not scratch.semaphores.any()
    with pytest.raises(ValueError, match="make it with linear_scratch"):
        small_linear(torch.zeros(21, 100), torch.zeros(48, 100), scratch=scratch)


@pytest.mark.parametrize("rows", [1, 17, 70])
def test_default_tiles_fit_every_shape(rows: int) -> None:
    for n, k in ((1, 1), (1024, 1024), (8192, 2048)):
        for bits in (8, 16, 32):
            tiles = default_tiles(n, k, rows, bits, fixed=False)
            assert not (tiles.library and bits == 8)


def test_no_rows(cpu: torch.device) -> None:
    assert small_linear(torch.empty(0, 8), torch.ones(4, 8)).shape == (0, 4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 7)}, r"weight is \[6, 8\]; x wants \[N, 7\]"),
    ({"x": torch.zeros(8, 3).T}, r"want contiguous \[R, K\]"),
    ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "choose float32, float16 or bfloat16"),
    ({"weight": torch.zeros(6, 8).half()}, "convert one of them"),
    ({"weight": torch.zeros(8, 6).T}, "weight must be contiguous"),
    ({"bias": torch.zeros(5)}, r"bias is .*want torch.float32\[6\]"),
    ({"weight": fold_norm(torch.ones(6, 8), None, torch.ones(8), torch.ones(8), 1e-5)}, "leave bias=None"),
    ({"out": torch.zeros(3, 5)}, r"out is .*\[3, 6\]"),
    ({"residual": torch.zeros(3, 6).half()}, "residual is torch.float16"),
    ({"residual": torch.zeros(3, 6), "out": torch.zeros(3, 6)}, "leave out=None"),
    ({"weight": quantize_int8(torch.ones(6, 8)), "tiles": LinearTiles(library=True)}, "choose tiles with library=False"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)}
    call: Callable[..., torch.Tensor] = small_linear
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


def test_x_is_not_overwritten_while_others_read_it() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="memory of its own"):
        small_linear(x, torch.zeros(8, 8), residual=x)


BAD_QKV: list[tuple[dict[str, Any], str]] = [
    ({"weight": torch.zeros(7, 8)}, r"want 3 \* D"),
    ({"cells": torch.zeros(4, 5, 2, 1, 3)}, r"H \* Dh = 2"),
    ({"cells": torch.zeros(4, 5, 2, 2, 1).transpose(0, 1)}, "one layer of the cache"),
    ({"cells": torch.zeros(4, 5, 2, 1, 2).half()}, "allocate the cache in x's dtype"),
    ({"rows": torch.zeros(3)}, r"rows is .*int32\[3\]"),
    ({"positions": torch.zeros(4, dtype=torch.int32)}, r"positions is .*int32\[3\]"),
    ({"q_out": torch.zeros(3, 6)}, r"q_out is .*\[3, 2\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_QKV)
def test_bad_cache_is_refused(change: dict[str, Any], message: str) -> None:
    index = torch.zeros(3, dtype=torch.int32)
    good = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(6, 8),
        "bias": torch.zeros(6),
        "cells": torch.zeros(4, 5, 2, 1, 2),
        "rows": index,
        "positions": index,
    }
    call: Callable[..., torch.Tensor] = qkv_linear
    with pytest.raises(ValueError, match=message):
        call(**(good | change))


@pytest.mark.parametrize(
    "bad",
    [
        {"bn": 24},
        {"bk": 1024},
        {"br": 8},
        {"split": 0},
        {"prefetch": True, "split": 2},
        {"br": 2, "bn": 32},
        {"br": 1, "bn": 4, "split": 2},
        {"gram": True, "br": 32},
        {"gram": True, "br": 64, "fuse_norm": False},
    ],
    ids=str,
)
def test_impossible_tiles_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose|cannot go with|goes with"):
        LinearTiles(**bad)
