"""`babelephant evaluate` on texts that the demonstration model has not seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from app.cli import main
from app.commands import evaluate
from tests.engine.tiny import TINY_ODD, make_tiny_checkpoint


def scores_of(path: Path) -> dict[str, dict[str, float]]:
    """First direction's interface scores by label."""
    return {label: directions[0] for label, directions in json.loads(path.read_text())["directions"].items()}


def test_a_direction_is_scored_at_each_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    few = ["--pair", "eng_Latn-deu_Latn", "--limit", "12", "--cldr-limit", "4", "--beam-size", "1", "--out", str(out)]
    assert main(["evaluate", *few, "--precision", "bf16", "--precision", "w8a16"]) == 0
    scores = scores_of(out)
    assert list(scores) == ["bf16", "w8a16"]
    for score in scores.values():
        assert (score["src_lang"], score["tgt_lang"], score["part"], score["num_sentences"]) == (
            "eng_Latn",
            "deu_Latn",
            "interface",
            12,
        )
        assert 40 < score["chrf"] < 100
    assert "| w8a16 | " in capsys.readouterr().out


def test_int8_dense_is_refused_where_nothing_would_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose heads the kernels cannot run would be scored without the option, and the table would not say so."""
    monkeypatch.setattr(evaluate, "require_device", lambda device: device)  # as on a machine with a GPU
    checkpoint = make_tiny_checkpoint(tmp_path, seed=1, **TINY_ODD)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with pytest.raises(ValueError, match="the kernels cannot run the heads of"):
        evaluate.run(parser.parse_args([str(checkpoint), "--device", "cuda", "--int8-dense"]))


@pytest.mark.gpu
def test_int8_dense_is_what_runs(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    few = ["--pair", "eng_Latn-deu_Latn", "--limit", "100", "--cldr-limit", "10", "--device", "cuda"]
    for name, options in (("plain", []), ("int8", ["--int8-dense"])):
        assert main(["evaluate", *few, *options, "--precision", "w4a16", "--out", str(tmp_path / name)]) == 0
    (plain,), (int8,) = (scores_of(tmp_path / name).values() for name in ("plain", "int8"))
    assert list(scores_of(tmp_path / "int8")) == ["w4a16+d8"]
    assert plain != int8  # something of the hundred texts was rounded otherwise
    assert abs(plain["chrf"] - int8["chrf"]) < 3
