import json
from pathlib import Path
from typing import Any

import pytest

from kernels.bench import main
from kernels.bench_plot import read_report, roof_flops_per_s
from kernels.bench_rows import Machine
from kernels.cases import FFN_SHAPES, PRECISIONS
from kernels.tune_candidates import candidates, mode_of

MACHINE = {"name": "made up", "bytes_per_s": 4e12, "flops_per_s": 8e14}


def row(case: str, us: float, flops: float, error: float = 0.0) -> dict[str, Any]:
    return {
        "op": "expert_gemm",
        "case": case,
        "us": us,
        "error": error,
        "limit": 0.01,
        "bytes_touched": 4_000_000,
        "flops": flops,
        "launches": 2,
        "anchors_us": {"grouped_mm": 3 * us},
        "floor_us": 5.0,
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"machine": MACHINE, "rows": list(rows)}), encoding="utf-8")
    return path


def test_report_is_printed_and_plotted_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("paper w4a16 T=1", 10.0, 1e7), row("paper w4a16 T=64", 40.0, 1e9), row("norm", 2.0, 0.0)]
    picture = tmp_path / "roofline.png"
    assert main(["--rows", str(write(tmp_path / "rows.json", *rows)), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "read 4.00 TB/s" in printed
    assert "400 GB/s" in printed  # 4 MB in 10 us
    assert "50.0% of floor" in printed  # two launches and 1 us of reading
    assert "3.00x" in printed


def test_failed_check_shows_no_time_and_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = write(tmp_path / "rows.json", row("good", 10.0, 1e7), row("wrong", 1.0, 1e7, error=0.5))
    assert main(["--rows", str(report), "--plot", str(tmp_path / "a.png")]) == 1
    assert "CHECK FAILED" in capsys.readouterr().out


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    report = write(tmp_path / "rows.json", row("wrong", 1.0, 1e7, error=float("nan")))
    with pytest.raises(ValueError, match="nothing to plot"):
        main(["--rows", str(report), "--plot", str(tmp_path / "a.png")])


def test_file_that_is_no_report_names_the_fix() -> None:
    with pytest.raises(ValueError, match="--out"):
        read_report({"rows": []})


def test_roofline_bends_where_both_ceilings_meet() -> None:
    machine = Machine("made up", 4e12, 8e14)
    assert roof_flops_per_s(machine, 10) == 4e13
    assert roof_flops_per_s(machine, 200) == 8e14
    assert roof_flops_per_s(machine, 1e6) == 8e14


@pytest.mark.parametrize("num_tokens", [1, 320, 4096])
def test_a_sweep_that_ends_early_has_seen_every_width(num_tokens: int) -> None:
    found = candidates(FFN_SHAPES["54b"], PRECISIONS["w8a16"], num_tokens)
    first_mode = [t for t in found if mode_of(t) == mode_of(found[0])]
    assert found[: len(first_mode)] == first_mode
    assert {t.bn1 for t in first_mode[:8]} == {t.bn1 for t in found}
