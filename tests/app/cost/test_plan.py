"""Catalogue, profiles, the plan of pools and the paper's table."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from app.cli import main
from app.cost.fleet import PlanError
from app.cost.hardware import CatalogueError, devices, price_catalogue, usd_per_million_chars
from app.cost.paper import paper_report, paper_table
from app.cost.plan import PlanRules, PoolDemand, make_plan, read_pools, table
from app.cost.profile import Birth, Profile, ProfileError, distinct_experts, fit_line, roofline_profile
from app.deployment import DeploymentPlan
from engine.config import ModelConfig

POOLS = """
- {name: en-de, peak_per_s: 120, mean_per_s: 60, source_chars: 110, source_tokens: 28, target_tokens: 30}
- {name: en-ja, peak_per_s: 20, mean_per_s: 8, source_chars: 90, source_tokens: 24, target_tokens: 35, arrival_cv2: 4}
"""


def nllb() -> ModelConfig:
    return ModelConfig.from_dict(json.loads((resources.files("app.cost") / "data" / "nllb_moe_54b.json").read_text()))


def measured(device: str, tau0_s: float, alpha_s: float) -> Profile:
    born = Birth("2026-11-24", "abc", device, "measured")
    return Profile(device, "m", "w8a16", 1, False, 0.001, 1e-5, 0.0, tau0_s, alpha_s, 60.0, 1e9, 32, born, {})


def test_the_shipped_catalogue_prices_known_devices_once_each() -> None:
    catalogue, known = price_catalogue(), devices()
    assert {offer.gpu for offer in catalogue.offers} <= known.keys()
    assert catalogue.offer("T4").usd_per_hour == 0.526
    assert all(offer.source and offer.cloud for offer in catalogue.offers)
    assert {price.usd_per_million_chars for price in catalogue.public} == {20, 25, 15, 10}
    with pytest.raises(CatalogueError, match="no spot price for 'T4'"):
        catalogue.offer("T4", "spot")


def test_bad_catalogues_name_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    for text, message in (
        ("[]", "date"),
        ("date: x\noffers: [{gpu: T4}]", "offer 1"),
        ("date: x\noffers: [{gpu: T4, purchase: lease, usd_per_hour: 1, cloud: c, instance: i, source: s}]", "lease"),
        ("date: x\noffers: [{gpu: T4, purchase: spot, usd_per_hour: 0, cloud: c, instance: i, source: s}]", "positive"),
    ):
        path.write_text(text)
        with pytest.raises(CatalogueError, match=message):
            price_catalogue(path)


def test_arithmetic_of_a_million_characters() -> None:
    assert usd_per_million_chars(0.526, 1000) == pytest.approx(0.146, abs=5e-4)
    assert usd_per_million_chars(7.912, 1000) == pytest.approx(2.198, abs=5e-4)
    with pytest.raises(ValueError, match="chars_per_s"):
        usd_per_million_chars(1.0, 0)


def test_profiles_come_back_as_saved_and_refuse_strange_files(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile = measured("H200", 0.01, 1e-4)
    profile.save(path)
    assert Profile.load(path) == profile
    raw = json.loads(path.read_text())
    for change, message in (({"version": 0}, "version 0"), ({"tau0_s": None}, "tau0_s"), ({"extra": 1}, "extra")):
        broken = {**raw, **change}
        broken = {name: value for name, value in broken.items() if value is not None}
        path.write_text(json.dumps(broken))
        with pytest.raises(ProfileError, match=message):
            Profile.load(path)


def test_a_line_is_recovered_with_honest_errors() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, 8, 32, 64, 128], 6)
    inside = 0
    for _ in range(100):
        seconds = (0.02 + 3e-4 * x) * rng.lognormal(0, 0.05, len(x))
        intercept, slope, intercept_error, slope_error = fit_line(x, seconds)
        inside += abs(intercept - 0.02) < 2 * intercept_error and abs(slope - 3e-4) < 2 * slope_error
    assert inside > 80
    assert fit_line(x, 3e-4 * x)[:2] == pytest.approx((0.0, 3e-4), abs=1e-9)
    with pytest.raises(ProfileError, match="sizes"):
        fit_line(np.ones(5), np.ones(5))


def test_distinct_experts_are_those_of_a_draw() -> None:
    rng = np.random.default_rng(1)
    drawn = [len(np.unique(rng.integers(0, 128, 64))) for _ in range(3000)]
    for rows, experts_per_token in ((32.0, 2), (64.0, 1)):
        assert distinct_experts(128, np.array([rows]), experts_per_token)[0] == pytest.approx(np.mean(drawn), rel=0.01)


def test_estimates_are_marked_and_follow_bandwidth() -> None:
    known = devices()
    fast, slow = (roofline_profile(nllb(), "54B", "w4a16", known[name]) for name in ("H200", "A100-40GB"))
    assert fast.estimated
    assert "roofline" in fast.born.method
    assert slow.tau0_s / fast.tau0_s == pytest.approx(4800 / 1555, rel=0.25)
    assert fast.capacity_per_s(28, 30, 1.0) > 1.5 * slow.capacity_per_s(28, 30, 1.0) > 0
    with pytest.raises(ProfileError, match="fewer bits"):
        roofline_profile(nllb(), "54B", "bf16", known["T4"])
    untied = roofline_profile(replace(nllb(), tie_word_embeddings=False), "54B", "w4a16", known["H200"])
    assert untied.memory_bytes > fast.memory_bytes
    assert (untied.tau0_s, untied.alpha_s) == (fast.tau0_s, fast.alpha_s)  # a step reads one of the two matrices


def test_a_plan_meets_its_rules_and_explains_itself(tmp_path: Path) -> None:
    pytest.importorskip("highspy")
    path = tmp_path / "pools.yaml"
    path.write_text(POOLS)
    pools = read_pools(path)
    catalogue = price_catalogue()
    profiles = {"L4": measured("L4", 0.008, 4e-4), "H100": measured("H100", 0.002, 5e-5)}
    plan = make_plan(pools, catalogue.offers, profiles, PlanRules(1.0, 0.8), catalogue)
    for pool in pools:
        lines = [line for line in plan.lines if line.pool == pool]
        total = sum(line.replicas * line.capacity_per_s for line in lines)
        assert total >= pool.peak_per_s
        assert total - max(line.capacity_per_s for line in lines) >= 0.8 * pool.peak_per_s
    assert plan.solved.gap <= 1e-3
    assert plan.usd_per_million_chars == pytest.approx(plan.solved.usd_per_hour / 3600 / (60 * 110 + 8 * 90) * 1e6)
    text = table(plan)
    assert "DeepL API Pro" in text
    assert "estimated" not in text
    assert any(word in text for word in ("peak", "N+1"))
    for quota, message in (({"L4": 0, "H100": 0}, "quotas"), ({"T4": 3}, "T4")):
        with pytest.raises(PlanError, match=message):
            make_plan(pools, catalogue.offers, profiles, PlanRules(1.0, 0.8, quota), catalogue)


def test_bad_pools_name_the_field(tmp_path: Path) -> None:
    path = tmp_path / "pools.yaml"
    for text, message in (
        ("{}", "list"),
        ("[{name: a}]", "pool 1"),
        (POOLS.replace("mean_per_s: 60", "mean_per_s: 600"), "above peak"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            read_pools(path)
    with pytest.raises(PlanError, match="source_chars"):
        PoolDemand("x", 2, 1, 0, 1, 1)


def test_a_pool_of_few_experts_needs_fewer_replicas(tmp_path: Path) -> None:
    pytest.importorskip("highspy")
    path, catalogue = tmp_path / "pools.yaml", price_catalogue()
    profile = Profile.load(Path(str(resources.files("app.cost") / "data" / "profile_nllb54b_w4a16_beam4_h200.json")))
    pool = "{name: p, peak_per_s: 9000, mean_per_s: 6000, source_chars: 110, source_tokens: 28, target_tokens: 30"
    costs = []
    for experts in ("}", ", experts_used: 128, num_experts: 128}", ", experts_used: 32, num_experts: 128}"):
        path.write_text(f"[{pool}{experts}]")
        plan = make_plan(read_pools(path), catalogue.offers, {"H200": profile}, PlanRules(), catalogue)
        costs.append(plan.solved.usd_per_hour)
    assert costs[1] == costs[0]
    assert costs[2] < 0.8 * costs[0]
    for experts, message in ((", experts_used: 9}", "or neither"), (", experts_used: 1, num_experts: 128}", "at least 2")):
        path.write_text(f"[{pool}{experts}]")
        with pytest.raises(PlanError, match=message):
            read_pools(path)


def test_the_papers_table_is_reproduced_and_its_claim_split() -> None:
    paper = paper_table()
    for row in paper.rows:
        assert row.usd_per_month_per_word_per_s() == pytest.approx(row.printed, abs=6e-4)
    assert paper.saving("T4 MoE b64") == pytest.approx(0.27, abs=0.003)
    assert paper.saving("T4 MoE b20") == pytest.approx(-0.19, abs=0.01)
    assert paper.saving("T4 MoE b64", gpu_unit=1.25) == pytest.approx(0.09, abs=0.003)
    assert paper.saving("T4 MoE b64", instances=1) == pytest.approx(0.909, abs=0.003)
    assert "8 instances" in paper_report()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("highspy")
    path = tmp_path / "pools.yaml"
    path.write_text(POOLS)
    assert main(["plan", str(path), "--gpu", "A100-80GB", "--gpu", "T4"]) == 0
    shown = capsys.readouterr().out
    assert "A100-80GB*" in shown
    assert "left out: NLLB-MoE-54B at w4a16" in shown
    assert main(["plan", "--paper"]) == 0
    assert main(["plan"]) == 2
    assert main(["plan", str(path), "--gpu", "T4"]) == 2
    assert main(["plan", str(path), "--quota", "L4"]) == 2
    assert main(["plan", str(path), "--gpu", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_a_plan_over_zones_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("highspy")
    path = tmp_path / "pools.yaml"
    path.write_text(POOLS)
    assert main(["plan", str(path), "--gpu", "H100", "--zones", "3", "--degraded", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert "zone of 3" in printed
    assert "  zones 1+1+" in printed
    assert main(["plan", str(path), "--gpu", "H100", "--zones", "0"]) == 2
    assert "zones is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted(Path(str(resources.files("app.cost") / "data")).glob("profile_*.json")), ids=lambda path: path.stem
)
def test_shipped_profiles_are_readable_and_measured(path: Path) -> None:
    profile = Profile.load(path)
    assert not profile.estimated
    assert profile.errors["tau0_s"] < 0.1 * profile.tau0_s
    assert profile.step_s(32) < profile.step_s(32, 32 * 40)
    assert profile.step_s(4) < profile.step_s(128)
    assert profile.capacity_per_s(24, 32, slo_s=10.0) > 0


def test_a_plan_is_written_for_deploy_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("highspy")
    pytest.importorskip("matplotlib")
    path, written, picture = tmp_path / "pools.yaml", tmp_path / "plan.json", tmp_path / "plan.png"
    path.write_text(POOLS)
    assert main(["plan", str(path), "--gpu", "H100", "--json", str(written), "--plot", str(picture)]) == 0
    lines = DeploymentPlan.read(written).lines
    assert {line.pool for line in lines} == {"en-de", "en-ja"}
    assert all(line.estimated and line.gpu == "H100" for line in lines)
    assert picture.read_bytes()[:4] == b"\x89PNG"
