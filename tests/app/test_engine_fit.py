"""The fit of a GPU's profile, against an engine of known costs under the loads that the profile is measured with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.cli import main
from app.commands import profile as command
from app.cost.profile import Profile
from app.engine_profile import expected_seconds, fault_of, fit_profile
from app.engine_timing import EngineTimer, Timing
from engine.bench.shapes import SHAPES
from engine.config import EngineConfig
from engine.device_runner import size_buckets
from engine.search.spec import ScoredTokens, SearchOutcome, SearchSpec
from engine.types import EncodedBatch

CONFIG = EngineConfig(device="cuda", precision="w4a16", max_rows=256)
BETA_S, GAMMA_S = 9e-9, 15e-9
ENTRIES, TOKENS = size_buckets(256), size_buckets(CONFIG.encode_token_budget, smallest=16)


def step_s(rows: int) -> float:
    """With empty caches: 0.40 ms for 1 row, 0.98 for 256."""
    padded = next(size for size in ENTRIES if size >= rows)
    return 4e-4 + 4e-5 * math.log2(padded) + 1e-6 * padded


def pass_s(tokens: int) -> float:
    """Up to 64 tokens more and more experts: 0.8 ms for 16, 1.5 for 64, 5 for 2048."""
    padded = next(size for size in TOKENS if size >= tokens)
    return 6e-4 + 1.2e-5 * min(padded, 64) + 1.8e-6 * padded


class MadeUpGPU:
    """A runner as DeviceRunner is one: sentences begin with two rows, and come back two steps after their last."""

    expert_loads = ()

    def __init__(self, noise: float = 0.01) -> None:
        self.now_s, self._noise = 0.0, noise
        self._rng = np.random.default_rng(5)
        self._source: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        self._held: dict[int, tuple[int, SearchSpec]] = {}
        self._late: list[list[SearchSpec]] = [[], []]

    def encode(self, batch: EncodedBatch) -> None:
        lengths = np.diff(batch.source_offsets).tolist()
        self._source.update(zip(batch.source_slots.tolist(), lengths, strict=True))
        self._work(pass_s(sum(lengths)))

    def start(self, specs: Sequence[SearchSpec]) -> None:
        self._held |= {spec.source_slot: (1, spec) for spec in specs}

    def decode(self) -> list[SearchOutcome]:
        if self._held:
            rows = cells = 0
            for held, spec in self._held.values():
                beams = 2 if held == 1 else len(spec.beam_rows)
                rows, cells = rows + beams, cells + beams * (held + 1)
            self._work(step_s(rows) + BETA_S * cells + GAMMA_S * sum(self._source[slot] for slot in self._held))
        self._held = {slot: (held + 1, spec) for slot, (held, spec) in self._held.items()}
        ended = [spec for held, spec in self._held.values() if held == spec.max_tokens]
        for spec in ended:
            del self._held[spec.source_slot]
        self._late.append(ended)
        return [SearchOutcome(spec.source_slot, (ScoredTokens((5, 2), 0.0),)) for spec in self._late.pop(0)]

    def _work(self, seconds: float) -> None:
        self.now_s += seconds * self._rng.lognormal(0, self._noise)


class MadeUpTimer(EngineTimer):
    """Reads the clock of the made-up GPU."""

    def __init__(self, gpu: MadeUpGPU) -> None:
        super().__init__(gpu, SHAPES["tiny"], CONFIG, 4)  # type: ignore[arg-type]
        self._gpu = gpu

    def _mark(self) -> float:
        return self._gpu.now_s

    def _seconds_between(self, begun: float, ended: float) -> float:
        return ended - begun


def fitted(timings: Sequence[Timing]) -> Profile:
    return fit_profile(timings, device="d", model="m", config=CONFIG, beam_size=4, length_step=0, startup_s=0.0, host_s=0.0)


@pytest.mark.parametrize("num_stalls", [0, 1, 6])
def test_known_costs_are_found_back_from_the_loads_of_a_gpu(num_stalls: int) -> None:
    gpu = MadeUpGPU()
    timer = MadeUpTimer(gpu)
    rounds = []
    for _ in range(4):
        parts = list(timer.measure(32))
        assert len(parts) == timer.num_parts(32)
        rounds.append([timing for part in parts for timing in part])
    seen, unseen = rounds[0] + rounds[1] + rounds[2], rounds[3]
    stalled = sorted(range(len(seen)), key=lambda index: -sum(seen[index].rows))[:num_stalls]  # under the largest loads
    noisy = [replace(timing, seconds=timing.seconds + 0.3 * (index in stalled)) for index, timing in enumerate(seen)]
    found = fitted(noisy)
    assert fault_of(found, noisy) is None
    points = [seconds for _, seconds in found.step_points]
    assert points == sorted(points)
    for rows in (4, 8, 16, 32, 64, 128, 256):
        assert found.step_s(rows) == pytest.approx(step_s(rows), rel=0.05), rows
    for tokens, count in ((20, 1), (100, 4), (500, 16), (1900, 64)):
        seconds = found.encode_s(np.full(count, tokens / count)) + found.host_s * count
        assert seconds == pytest.approx(pass_s(tokens), rel=0.15), tokens
    # padded steps and passes are not quite what curves over rows and tokens can say
    assert found.beta_s == pytest.approx(BETA_S, rel=0.4)
    assert found.gamma_s == pytest.approx(GAMMA_S, rel=0.4)
    assert 0.9e-6 < found.alpha_s < 3e-6
    assert 1e-6 < found.a1_s < 3e-6
    assert expected_seconds(found, unseen) == pytest.approx(sum(timing.seconds for timing in unseen), rel=0.01)


def test_nonsense_is_named() -> None:
    timings = [timing for part in MadeUpTimer(MadeUpGPU()).measure(32) for timing in part]
    found = fitted(timings)
    assert fault_of(found, timings) is None
    falling = replace(found, step_points=(*found.step_points[:-1], (256.0, 3e-4)))
    assert "256 rows would take 0.300 ms, and one of 128 rows" in str(fault_of(falling, timings))
    flat = replace(found, step_points=((4.0, 5e-4), (64.0, 5e-4), (256.0, 5e-4)))
    assert "one of 4 rows 0.500 ms" in str(fault_of(flat, timings))
    slow = [replace(timing, seconds=1.5 * timing.seconds) for timing in timings]
    assert "10% of the timings are more than 3" in str(fault_of(found, slow))  # by a third too little


@pytest.mark.parametrize(("noise", "code"), [(0.01, 0), (0.6, 2)])
def test_the_command_does_not_write_a_profile_that_explains_nothing(
    noise: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(args: argparse.Namespace, config: EngineConfig) -> Profile:
        timer = MadeUpTimer(MadeUpGPU(noise))
        timer._seconds_between = lambda begun, ended: (ended - begun) * timer._rng.lognormal(0, noise)  # type: ignore[method-assign]
        return command._measured(args, timer, config, "m", 0.0, 0.0, "")

    monkeypatch.setattr(command, "require_device", lambda device: None)
    monkeypatch.setattr(command, "_profile_shape", measured)
    out = tmp_path / "profile.json"
    options = ["--shape", "tiny", "--device", "cuda", "--rounds", "3", "--name", "d", "--out", str(out)]
    assert main(["profile", *options]) == code
    said = capsys.readouterr()
    assert "per decode step" in said.out
    assert out.exists() == (code == 0)
    if code:
        assert "not written" in said.err
        assert "--rounds (they were 3)" in said.err
