import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kernels import tile_configs
from kernels.linear_bench import LINEAR_SHAPES, LinearShape, int8_rows_shapes
from kernels.linear_candidates import candidates, fixed_candidates, int8_rows_candidates
from kernels.linear_tune import jobs_of, main
from kernels.small_linear import LinearTiles
from kernels.small_linear.tiles import select_tiles, select_tiles_int8_rows

SHAPE = LinearShape("ffn2", 1024, 4096, residual=True)


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=lambda s: f"{s.name}-{s.n}")
@pytest.mark.parametrize("rows", [1, 32, 320])
def test_candidates_begin_with_torch_and_the_fixed_set(shape: LinearShape, rows: int) -> None:
    found = candidates(shape, rows)
    assert found[0].library
    assert set(found[1 : 1 + len(fixed_candidates(shape))]) == set(fixed_candidates(shape))
    assert len(set(found)) == len(found) >= 20
    assert all(jobs_of(shape, 16, tiles) for tiles in found if not tiles.library)


@pytest.mark.parametrize("shape", (*int8_rows_shapes(1024), *int8_rows_shapes(2048)), ids=lambda s: f"{s.name}-{s.n}")
@pytest.mark.parametrize("rows", [1, 32, 320])
def test_candidates_for_int8_rows_divide_the_shape(shape: LinearShape, rows: int) -> None:
    found = int8_rows_candidates(shape, rows)
    assert found
    features = shape.n // 3 if shape.cache else shape.n
    assert all(t.specialized and features % t.bn == 0 and shape.k % t.bk == 0 for t in found)
    assert all(jobs_of(shape, 8, t)[0][1] == "specialized_linear_kernel" for t in found)


def record(rows: int, tiles: LinearTiles, us: float | None, shape: LinearShape = SHAPE) -> str:
    line = {
        "shape": dataclasses.asdict(shape),
        "bits": 8 if shape.int8_rows else 16,
        "rows": rows,
        "error": 0.0,
        "us": us,
        "device": "Made Up 1",
    }
    return json.dumps(line | {"tiles": dataclasses.asdict(tiles)})


def test_choices_of_a_sweep_are_what_a_call_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, steady, wrong, torchs = LinearTiles(16), LinearTiles(32), LinearTiles(64), LinearTiles(library=True)
    times = {1: {ours: 2.0, steady: 2.5, wrong: None, torchs: 5.0}, 320: {steady: 9.0, torchs: 7.0, wrong: None}}
    lines = [record(rows, tiles, us) for rows, table in times.items() for tiles, us in table.items()]
    quantized = dataclasses.replace(SHAPE, int8_rows=True)
    lines += [record(64, steady, 3.0, quantized), record(64, ours, 2.0, quantized)]
    (tmp_path / "linear_sweep.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main(["--out", str(tmp_path), "--summarize"]) == 0
    folder = tmp_path / "made_up_1"
    folder.mkdir()
    (tmp_path / "small_linear.json").rename(folder / "small_linear.json")
    monkeypatch.setattr(tile_configs, "CONFIG_ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made Up 1")
    cuda = torch.device("cuda:0")

    def chosen(rows: int, *, fixed: bool = False) -> LinearTiles:
        return select_tiles(1024, 4096, rows, 16, cuda, norm=False, fixed=fixed)

    assert chosen(1) == ours
    assert chosen(17) == chosen(320) == chosen(5000) == torchs
    assert {chosen(rows, fixed=True) for rows in (1, 17, 320)} == {steady}  # timed at every size
    assert select_tiles(1024, 4096, 1, 8, cuda, norm=False, fixed=False) != ours  # nobody measured int8
    assert select_tiles_int8_rows(1024, 4096, 64, cuda) == ours
    assert select_tiles_int8_rows(1024, 1024, 64, cuda) != ours
