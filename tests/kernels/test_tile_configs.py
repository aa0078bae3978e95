import json
import math
from pathlib import Path
from typing import Any

import pytest

from kernels.cases import FFN_SHAPES, PRECISIONS, FfnShape, Precision
from kernels.expert_gemm import FfnTiles
from kernels.route import GateTiles
from kernels.tile_configs import CONFIG_ROOT, device_folder, measured_choice, stored_choice

FILES = sorted(CONFIG_ROOT.glob("*/*.json"))
DEVICE = "NVIDIA H200"
SIZES = (1, 2, 3, 4, 5, 16, 17, 40, 64, 65, 320, 321, 1024, 4095, 4096, 4097, 16384)


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_file_has_a_birth_certificate_of_its_own_device(path: Path) -> None:
    certificate = read(path)["certificate"]
    assert set(certificate) - {"note"} == {"gpu", "torch", "triton", "date", "commit"}
    assert device_folder(certificate["gpu"]) == path.parent.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_two_entries_serve_the_same_size_and_all_were_measured(path: Path) -> None:
    entries = read(path)["entries"]
    keys = [(tuple(sorted(e["shape"].items())), e["max_size"]) for e in entries]
    assert len(set(keys)) == len(keys)
    assert all(math.isfinite(e["us"]) and e["us"] > 0 for e in entries)


@pytest.mark.parametrize("shape", FFN_SHAPES.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("precision", [PRECISIONS[n] for n in ("w4a16", "w8a16", "bf16")], ids=lambda p: p.name)
@pytest.mark.parametrize("num_tokens", SIZES)
def test_h200_has_tiles_that_fit_every_shape(shape: FfnShape, precision: Precision, num_tokens: int) -> None:
    key = {"bits": precision.bits, "group": 0, "d": shape.d_model, "f": shape.d_ff, "e": shape.num_experts}
    choice = stored_choice("expert_gemm", DEVICE, tuple(sorted(key.items())), num_tokens * shape.top_k)
    assert choice is not None
    tiles = FfnTiles(**choice)  # type: ignore[arg-type]
    step = 64 * tiles.join if precision.bits == 16 else 1024 // precision.bits
    assert shape.d_ff % (step * tiles.split) == 0
    assert shape.d_ff % tiles.bn1 == 0
    assert shape.d_model % tiles.bn2 == 0


@pytest.mark.parametrize("path", sorted(CONFIG_ROOT.glob("*/route.json")), ids=lambda p: p.parent.name)
def test_the_gate_is_cut_the_same_way_for_every_number_of_tokens(path: Path) -> None:
    gpu = read(path)["certificate"]["gpu"]
    for shape in FFN_SHAPES.values():
        choices = [stored_choice("route", gpu, (("d", shape.d_model), ("e", shape.num_experts)), size) for size in SIZES]
        assert choices[0] is not None
        tiles = GateTiles(**choices[0])  # type: ignore[arg-type]
        assert shape.d_model % (tiles.features * tiles.split) == 0
        assert all(choice == choices[0] for choice in choices)


def test_the_smallest_entry_that_reaches_a_size_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.tile_configs.CONFIG_ROOT", tmp_path)
    entries = [{"shape": {"d": 8}, "max_size": size, "choice": {"split": size}} for size in (64, 4)]
    (tmp_path / "acme_one").mkdir()
    (tmp_path / "acme_one" / "op.json").write_text(json.dumps({"entries": entries}), encoding="utf-8")
    got = [stored_choice("op", "Acme One", (("d", 8),), size) for size in (1, 4, 5, 64, 65)]
    assert got == [{"split": s} for s in (4, 4, 64, 64, 64)]
    assert stored_choice("op", "Acme One", (("d", 9),), 1) is None
    assert stored_choice("op", "Acme Two", (("d", 8),), 1) is None


def test_a_cpu_has_no_measured_choice() -> None:
    import torch

    assert measured_choice("route", torch.device("cpu"), shape={"d": 1024, "e": 32}, size=1) is None
