"""Experts touched against draws of rows; a step's cost of an expert against steps made with a known one."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from app.cost.expert_usage import ExpertUsage, ExpertUsageError, even, expert_seconds, experts_used, narrowed, touched
from app.cost.profile import Birth, Profile, ProfileError
from app.cost.traces import Floats


def drawn(shares: Floats, rows: int, rng: np.random.Generator, repeats: int = 400) -> float:
    """Mean number of experts that so many rows touch, each of them two different ones with these probabilities."""
    counts = []
    for _ in range(repeats):
        for layer in shares:
            noise = rng.gumbel(size=(rows, len(layer)))
            two = np.argsort(np.log(np.maximum(layer, 1e-12)) + noise, axis=1)[:, -2:]
            counts.append(len(np.unique(two)))
    return float(np.mean(counts))


def measured_shares(weights: Floats, rng: np.random.Generator) -> Floats:
    """What counting rows would give for two experts drawn as in `drawn`."""
    shares = np.zeros_like(weights)
    for layer, row in zip(weights, shares, strict=True):
        noise = rng.gumbel(size=(200_000, len(layer)))
        two = np.argpartition(np.log(np.maximum(layer, 1e-12)) + noise, -2, axis=1)[:, -2:]
        row += np.bincount(two.ravel(), minlength=len(layer)) / 200_000
    return shares


def test_touched_experts_are_those_of_a_draw() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(24, 0.3), size=2)
    shares = measured_shares(weights, rng)
    for rows, expected in zip((8, 32, 128), touched(shares), strict=True):
        assert expected == pytest.approx(drawn(weights, rows, rng), rel=0.05)


def test_the_even_number_is_the_number_where_use_is_even() -> None:
    for used in (2, 3, 17, 64):
        shares = np.zeros((3, 64))
        shares[:, :used] = 2 / used
        assert experts_used(shares) == pytest.approx(used, rel=1e-6)
    rng = np.random.default_rng(1)
    skewed = 2 * rng.dirichlet(np.full(64, 0.2), size=3)
    found = experts_used(np.minimum(skewed, 1.0))
    assert 2 < found < 64
    np.testing.assert_allclose(even(found, np.array([8, 32, 128])).sum(), touched(skewed).sum(), rtol=1e-6)


def test_one_expert_a_row() -> None:
    """Against draws of one expert, and the even number where use is even; an expert's seconds come back from the steps."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(24, 0.3), size=2)
    for rows, expected in zip((8, 32, 128), touched(shares), strict=True):
        drawn = [len(np.unique(rng.choice(24, rows, p=layer))) for _ in range(400) for layer in shares]
        assert expected == pytest.approx(np.mean(drawn), rel=0.03)
    for used in (1, 3, 17):
        narrow = np.zeros((3, 64))
        narrow[:, :used] = 1 / used
        assert experts_used(narrow, 1) == pytest.approx(used, rel=1e-6)
    rows = np.array([4, 8, 16, 32, 64, 128.0])
    steps = 0.002 + 3e-6 * rows + 2e-5 * even(64, rows, 1)
    profile = replace(made_profile(0.0), step_points=tuple(zip(rows.tolist(), steps.tolist(), strict=True)))
    assert expert_seconds(profile, 64, 1) == pytest.approx(2e-5, rel=1e-6)
    for at, seconds in narrowed(profile, 1, 64, 1).step_points:
        assert seconds == pytest.approx(0.002 + 3e-6 * at + 2e-5)


def made_profile(each_s: float, num_experts: int = 64) -> Profile:
    rows = np.array([4, 8, 16, 32, 64, 128, 256.0])
    steps = 0.002 + 3e-6 * rows + each_s * even(num_experts, rows)
    points = tuple(zip(rows.tolist(), steps.tolist(), strict=True))
    born = Birth("", "", "", "")
    return Profile("d", "m", "w4a16", 4, False, 0.001, 1e-6, 0.0, 0.0025, 6e-6, 9.0, 1e9, 64, born, {}, points, 1e-4)


def test_a_narrow_pool_saves_the_experts_it_does_not_touch() -> None:
    profile = made_profile(3e-5)
    assert expert_seconds(profile, 64) == pytest.approx(3e-5, rel=1e-6)
    narrow = narrowed(profile, 16, 64)
    for rows, seconds in narrow.step_points:
        assert seconds == pytest.approx(0.002 + 3e-6 * rows + 3e-5 * float(even(16, rows)))
    rates = [narrowed(profile, used, 64).capacity_per_s(28, 30, 1.0) for used in (64, 40, 16, 4)]
    assert rates == sorted(rates)
    assert rates[-1] > 1.2 * rates[0]
    assert narrowed(profile, 64, 64) == profile
    free = made_profile(0.0)
    assert narrowed(free, 8, 64).capacity_per_s(28, 30, 1.0) == pytest.approx(free.capacity_per_s(28, 30, 1.0))


def test_the_measured_h200_profile_shows_the_bytes_of_an_expert() -> None:
    """NLLB-MoE-54B in int4: an expert of each of 6 sparse decoder layers is 100.7 MB, at least 21 us at 4.8 TB/s."""
    path = Path(str(resources.files("app.cost") / "data" / "profile_nllb54b_w4a16_beam4_h200.json"))
    seconds = expert_seconds(Profile.load(path), 128)
    assert seconds == pytest.approx(6 * 2048 * 8192 / 4.8e12, rel=0.5)


def test_bad_profiles_and_numbers_are_refused() -> None:
    profile = made_profile(1e-5)
    with pytest.raises(ProfileError, match="4 are needed"):
        narrowed(replace(profile, step_points=profile.step_points[:3]), 8, 64)
    with pytest.raises(ProfileError, match="between 2"):
        narrowed(profile, 1, 64)


def test_measurements_come_back_and_pairs_not_measured_borrow(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    counts = {pair: rng.integers(0, 100, (2, 6)).astype(float) for pair in ("a-x", "b-x", "a-y")}
    one = ExpertUsage("model", 6, (1, 3), counts, "texts", experts_per_token=1)
    one.save(tmp_path / "one.json")
    np.testing.assert_allclose(ExpertUsage.load(tmp_path / "one.json").shares("a-x").sum(1), 1.0)
    usage = ExpertUsage("model", 6, (1, 3), counts, "texts")
    path = tmp_path / "experts.json"
    usage.save(path)
    again = ExpertUsage.load(path)
    for pair, rows in counts.items():
        np.testing.assert_array_equal(again.counts[pair], rows)
        np.testing.assert_allclose(again.shares(pair).sum(1), 2.0)
    np.testing.assert_allclose(again.shares("c-x"), (again.shares("a-x") + again.shares("b-x")) / 2)
    np.testing.assert_allclose(again.shares("c-z"), sum(map(again.shares, counts)) / 3)
    raw = json.loads(path.read_text())
    del raw["experts_per_token"]  # as files of before have it: two
    path.write_text(json.dumps(raw))
    assert ExpertUsage.load(path).experts_per_token == 2
    for change, message in (
        ({"babelephant_experts": 9}, "version 9"),
        ({"counts": {}}, "no pair"),
        ({"counts": {"a-x": [[1, 2, 3]]}}, "2 layers of 6"),
        ({"counts": {"a-x": [[0] * 6, [1] * 6]}}, "2 layers of 6"),
        ({"counts": 7}, "no measurement"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(ExpertUsageError, match=message):
            ExpertUsage.load(path)
