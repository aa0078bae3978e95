"""`babelephant bench` as a user runs it, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from engine.bench import benchmark
from engine.bench.check import CheckResult
from engine.config import EngineConfig
from engine.weights.loading import load_transformer
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import write_tiny_tokenizer

TINY = ["bench", "--shape", "tiny", "--device", "cpu"]


def test_the_tiny_shape_is_exact_and_everything_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--cells", "1x1,2x2", "--peers", "transformers", "--repeats", "1", "--mix", "6", "--mix-rows", "8"]
    assert main([*TINY, *arguments, "--out", str(out), "--plot", str(tmp_path / "bench.png")]) == 0
    report = json.loads(out.read_text())
    assert report["is_complete"]
    assert report["refusals"] == []
    assert report["certificate"]["transformers"] == "4.57.6"
    assert {check["cell"]: check["token_agreement"] for check in report["checks"]["fp32"]} == {"64x1": 1.0, "32x4": 1.0}
    assert list(report["cells"]) == ["1x1", "2x2"]
    for cell in report["cells"].values():
        assert cell["rows"].keys() == {"transformers", "fp32"}
        assert cell["rows"]["fp32"]["token_agreement"] == 1.0
        assert cell["decoder_experts"] >= 0.9 * cell["decoder_experts_uniform"]
        ours, theirs = cell["rows"]["fp32"], cell["rows"]["transformers"]
        assert cell["ratios"]["fp32"]["transformers"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
        assert ours["floor_share"] == pytest.approx(ours["bytes_per_step"] / report["bytes_per_s"] / (ours["step_ms"] / 1e3))
    assert report["serving_mix"]["fp32"]["equal_share"] == 1.0
    assert (tmp_path / "bench.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "2x2 fp32" in shown
    assert "continuous / static" in shown


def test_a_trained_checkpoint_and_a_quantized_precision(tmp_path: Path) -> None:
    """Quantized weights are another model than the peer's: compared, not refused. The fp32 parity check runs first."""
    checkpoint = write_tiny_tokenizer(make_tiny_checkpoint(tmp_path / "model", seed=3, eos_bias=4.0))
    out = tmp_path / "bench.json"
    arguments = ["--cells", "3x2", "--precisions", "fp32,w8a16", "--repeats", "1", "--out", str(out)]
    assert main(["bench", "--checkpoint", str(checkpoint), *arguments]) == 0
    report = json.loads(out.read_text())
    assert report["cells"]["3x2"]["rows"].keys() == {"transformers", "grouped", "fp32", "w8a16"}
    assert report["cells"]["3x2"]["rows"]["fp32"]["token_agreement"] == 1.0
    assert all(check["token_agreement"] == 1.0 for name in ("tiny fp32", "fp32") for check in report["checks"][name])


def test_one_expert_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's gating: exact beside both patched peers, said in the report and in the table; a checkpoint has its own."""
    out = tmp_path / "bench.json"
    arguments = ["--experts-per-token", "1", "--cells", "3x2", "--repeats", "1"]
    assert main([*TINY, *arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["model"]["experts_per_token"] == 1
    assert report["certificate"]["transformers"] == "4.57.6, router patched to top-1"
    assert {check["token_agreement"] for check in report["checks"]["fp32"]} == {1.0}
    cell = report["cells"]["3x2"]
    assert {name: row["token_agreement"] for name, row in cell["rows"].items()} == dict.fromkeys(
        ("transformers", "grouped", "fp32"), 1.0
    )
    assert cell["decoder_experts_uniform"] == pytest.approx(8 * (1 - 0.875**6))
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert table.startswith("top-1 gating (Switch's and the paper's); transformers 4.57.6, router patched to top-1")
    assert main([*TINY, "--experts-per-token", "1", "--write", str(tmp_path / "switch")]) == 0
    assert load_transformer(tmp_path / "switch", EngineConfig(precision="fp32")).config.num_experts_per_tok == 1
    assert main(["bench", "--checkpoint", str(tmp_path / "switch"), "--experts-per-token", "2"]) == 2
    assert "has num_experts_per_tok 1 in its config.json, not 2" in capsys.readouterr().err


def test_a_wrong_engine_gets_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine with other weights than the peer: refused by name, nothing of it in the table, the peer's rows stay."""
    right = benchmark.random_transformer
    monkeypatch.setattr(
        benchmark,
        "random_transformer",
        lambda weights, config: right(benchmark.RandomWeights(weights.config, weights.device, seed=99), config),
    )
    out = tmp_path / "bench.json"
    assert main([*TINY, "--cells", "2x1", "--peers", "transformers", "--repeats", "1", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["cells"]["2x1"]["rows"].keys() == {"transformers"}
    assert not report["is_complete"]
    assert "fp32" in report["refusals"][0]
    assert "refused" in capsys.readouterr().err


def test_out_of_time_keeps_what_there_is(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main([*TINY, "--cells", "1x1", "--limit-s", "0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["cells"] == {}
    assert any("out of time" in note for note in report["notes"])
    assert not report["is_complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "1by2"], "BATCHxBEAM"),
        (["--precisions", "int4"], "w4a16"),
        (["--peers", "ctranslate2"], "transformers"),
        (["--repeats", "0"], "at least 1"),
        (["--device", "cuda"], "choose cpu"),
        (["--ablate", "2x2"], "give --device cuda"),
        (["--ablate", "2by2"], "BATCHxBEAM"),
    ],
)
def test_bad_input_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_nan_score_is_no_pass() -> None:
    check = CheckResult("32x1", exact_wanted=False, token_agreement=1.0, score_error=float("nan"), best_share=1.0)
    assert check.failure is not None


def test_a_random_model_is_written_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms load as what they say they are; the fp16 one goes through the normal converter."""
    assert main([*TINY, "--write", str(tmp_path / "int4"), "--precisions", "w4a16"]) == 0
    assert main([*TINY, "--write", str(tmp_path / "fp16")]) == 0
    assert main(["convert", str(tmp_path / "fp16"), str(tmp_path / "int8"), "--precision", "w8a16"]) == 0
    for name, precision in (("int4", "w4a16"), ("int8", "w8a16"), ("fp16", "fp32")):
        load_transformer(tmp_path / name, EngineConfig(precision=precision))
    assert main([*TINY, "--write", str(tmp_path / "int4")]) == 2
    assert "choose another directory" in capsys.readouterr().err
    assert main([*TINY, "--write", str(tmp_path / "new"), "--precisions", "bf16"]) == 2
    assert not (tmp_path / "new").exists()
