"""`babelephant experts` and what `plan --layout` does with it, on the demonstration model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from app.cli import main
from app.cost.expert_usage import ExpertUsage

PROFILE = str(resources.files("app.cost") / "data" / "profile_demo_w8a16_beam4_cpu.json")
PAIRS = """
correlation: 0.3
pairs:
- {pair: eng_Latn-deu_Latn, peak_per_s: 9, mean_per_s: 4, source_chars: 40, source_tokens: 12, target_tokens: 14}
- {pair: eng_Latn-rus_Cyrl, peak_per_s: 5, mean_per_s: 2, source_chars: 40, source_tokens: 12, target_tokens: 13}
- {pair: deu_Latn-eng_Latn, peak_per_s: 2, mean_per_s: 1, source_chars: 45, source_tokens: 13, target_tokens: 11}
"""
PRICES = """
date: 2026-11-26
offers: [{gpu: AMD EPYC, purchase: on_demand, usd_per_hour: 0.1, cloud: c, instance: i, source: s}]
public: []
cpu_machines: []
"""


def test_measured_experts_go_into_a_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, experts, pairs, pools, prices = (
        tmp_path / name for name in ("t.yaml", "e.json", "p.yaml", "pools.yaml", "prices")
    )
    texts.write_text("eng_Latn: [Save, Cancel, Choose a folder for the backup]\n")
    assert main(["experts", "--pair", "en-de", "--pair", "en-ru", "--texts", str(texts), "--out", str(experts)]) == 0
    usage = ExpertUsage.load(experts)
    assert list(usage.counts) == ["eng_Latn-deu_Latn", "eng_Latn-rus_Cyrl"]
    assert (usage.num_experts, usage.model) == (8, "demonstration model")
    pairs.write_text(PAIRS)
    prices.write_text(PRICES)
    common = ["--profile", PROFILE, "--prices", str(prices), "--gpu", "AMD EPYC"]
    assert main(["plan", "--layout", str(pairs), "--experts", str(experts), "--out", str(pools), *common]) == 0
    printed = capsys.readouterr().out
    assert "all partitions were looked at" in printed
    assert "of 8 in a layer" in printed
    written = yaml.safe_load(pools.read_text())
    assert sum(pool["mean_per_s"] for pool in written) == pytest.approx(7)
    assert all(2 <= pool["experts_used"] <= pool["num_experts"] == 8 for pool in written)
    pytest.importorskip("highspy")
    assert main(["plan", str(pools), *common]) == 0
    this = next(line for line in printed.splitlines() if line.startswith("this layout"))
    assert f"total {float(this.split()[2]):.2f} USD/h" in capsys.readouterr().out


def test_a_layout_without_experts_is_a_plan_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("highspy")
    pairs, pools, prices = (tmp_path / name for name in ("p.yaml", "pools.yaml", "prices"))
    pairs.write_text(PAIRS)
    prices.write_text(PRICES)
    common = ["--profile", PROFILE, "--prices", str(prices), "--gpu", "AMD EPYC"]
    assert main(["plan", "--layout", str(pairs), "--out", str(pools), *common]) == 0
    layout = capsys.readouterr().out
    assert main(["plan", str(pools), *common]) == 0
    plan = capsys.readouterr().out
    this = next(line for line in layout.splitlines() if line.startswith("this layout"))
    assert f"total {float(this.split()[2]):.2f} USD/h" in plan


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.yaml"
    pairs.write_text("pairs: [{pair: a-b, peak_per_s: 2, mean_per_s: 1, source_chars: 9}]")
    for arguments, message in (
        (["plan", "--layout", str(pairs)], "no translation was seen"),
        (["plan", str(pairs), "--layout", str(pairs)], "--layout with one of pairs"),
        (["plan", str(pairs), "--experts", "e.json"], "belong to --layout"),
        (["plan", "--layout", str(tmp_path / "none.yaml")], "none.yaml"),
        (["experts", "--pair", "en-xx"], "language pair"),
        (["experts", "--pair", "ga-en"], "no texts in gle_Latn"),
        (["experts", "--limit", "0"], "--limit"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
