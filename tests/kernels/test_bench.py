import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import bench_ops, linear_bench
from kernels.bench import main
from kernels.bench_plot import roof_flops_per_s
from kernels.bench_rows import Machine, Report, Row, read_report, time_if_right
from kernels.cases import FFN_SHAPES, PRECISIONS
from kernels.tune_candidates import candidates, mode_of

MACHINE: dict[str, Any] = {"name": "made up", "bytes_per_s": 4e12, "flops_per_s": 8e14}
BORN = {"gpu": "made up", "torch": "2.0", "triton": "3.0", "date": "2026-11-26", "commit": "abc1234"}


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
    path.write_text(json.dumps({"certificate": BORN, "machine": MACHINE, "rows": list(rows)}), encoding="utf-8")
    return path


def test_report_is_printed_and_plotted_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("paper w4a16 T=1", 10.0, 1e7), row("paper w4a16 T=64", 40.0, 1e9), row("norm", 2.0, 0.0)]
    picture = tmp_path / "roofline.png"
    assert main(["--rows", str(write(tmp_path / "rows.json", *rows)), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "made up: read 4.00 TB/s" in printed
    assert "2026-11-26, commit abc1234, torch 2.0, triton 3.0: command not kept\n" in printed  # a report of before that
    assert "400 GB/s" in printed  # 4 MB in 10 us
    assert "50.0% of floor" in printed  # two launches and 1 us of reading
    assert "3.00x" in printed


def test_failed_check_shows_no_time_and_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = write(tmp_path / "rows.json", row("good", 10.0, 1e7), row("wrong", 0.0, 1e7, error=0.5))
    assert main(["--rows", str(report), "--plot", str(tmp_path / "a.png")]) == 1
    assert "CHECK FAILED" in capsys.readouterr().out


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    report = write(tmp_path / "rows.json", row("wrong", 0.0, 1e7, error=float("nan")))
    with pytest.raises(ValueError, match="nothing to plot"):
        main(["--rows", str(report), "--plot", str(tmp_path / "a.png")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": []}', r"\['certificate', 'machine'\] missing: write one with kernels.bench --out"),
        (
            '{"certificate": {"date": ""}, "machine": 1, "rows": []}',
            r"\['commit', 'torch', 'triton'\] missing in its certif",
        ),
        (json.dumps({"certificate": BORN, "machine": MACHINE, "rows": [{"op": "route"}]}), "report, .*required positional"),
        ("[1, 2]", "missing"),
        ("7", "write one with kernels.bench --out"),
        ("op,us", "Expecting value"),
        (None, "No such file"),
    ],
)
def test_file_that_is_no_report_names_the_fix(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["--rows", str(path)])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert str(path) in printed
    assert re.search(message, printed)


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_a_wrong_result_has_no_time(error: float) -> None:
    def measured() -> float:
        raise AssertionError("a wrong result was timed")

    assert time_if_right(error, 0.01, measured) == 0.0
    assert time_if_right(0.01, 0.01, lambda: 7.0) == 7.0
    with pytest.raises(ValueError, match="a time beside a failed check"):
        read_report({"certificate": BORN, "machine": MACHINE, "rows": [row("forged", 1.0, 1e7, error=error)]})


def test_a_report_is_read_as_it_was_written() -> None:
    rows = [Row("route", "R=1", 3.5, 0.0, 0.01, 1000, launches=2, anchors_us={"torch": 9.0}), Row("embed", "", 0, 1, 0, 8)]
    report = Report(BORN | {"command": "python -m kernels.bench --quick"}, Machine(**MACHINE), rows)
    written = json.loads(json.dumps(report.as_json()))
    assert written["rows"][0]["floor_us"] == pytest.approx(4.0, abs=1e-3)
    assert read_report(written) == report


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "module"), [("add_layernorm", bench_ops), ("route", bench_ops), ("embed", linear_bench)])
def test_a_wrong_kernel_is_reported_without_a_time(
    op: str, module: ModuleType, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, op)

    def wrong(*operands: Any, **options: Any) -> Any:
        result = right(*operands, **options)
        for tensor in (result.gate_weights,) if op == "route" else result if isinstance(result, tuple) else (result,):
            tensor.view(-1)[0] += 100.0
        return result

    monkeypatch.setattr(module, op, wrong)
    out = tmp_path / "report.json"
    assert main(["--ops", op, "--quick", "--out", str(out)]) == 1
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["certificate"]["command"] == f"python -m kernels.bench --ops {op} --quick --out {out}"
    assert report["rows"]
    assert all(line["error"] > line["limit"] and line["us"] == 0.0 for line in report["rows"])


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
