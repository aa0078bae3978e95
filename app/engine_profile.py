"""A profile of the engine on this machine: fits its parameters to timings and notes where it was born.

Torch loads inside the functions.
"""

from __future__ import annotations

import datetime
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.clocks import WallClock
from app.cost.profile import PARAMETERS, Birth, Points, Profile, fit_costs
from app.cost.traces import Floats
from app.engine_timing import Timing
from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

_START = "from pathlib import Path; from engine.config import EngineConfig; from engine.translator import Translator; " + (
    "import sys; t = Translator.load(Path(sys.argv[1]), EngineConfig(device=sys.argv[2], precision=sys.argv[3])); "
    "t.translate(['1'], src_lang=t.languages[0], tgt_lang=t.languages[-1])"
)
# Costs of the fit. Of the shared ones (never curves) the last three are what a pass and its sentences cost in
# decode steps, where those are timed on their own: the first step reads weights that the pass drove from the caches, and is
# fed the sentences' start tokens besides. They become parts of a0_s and host_s.
_SHARED = ("gamma_s", "a2_s", "host_s", "ending_s", "first_step_s", "start_s", "end_s")
_COSTS = ("tau0_s", "alpha_s", "beta_s", "a0_s", "a1_s", *_SHARED)


def host_seconds(tokenizer: Tokenizer, texts: Sequence[str], languages: tuple[str, str], clock: WallClock) -> float:
    """Median time to tokenize one of `texts` and detokenize a text of its length."""
    times = []
    for text in texts:
        started = clock.now()
        tokenizer.decode(tokenizer.encode(text, languages[0]).tolist())
        times.append(clock.now() - started)
    return float(np.median(times))


def start_up_seconds(checkpoint: Path, config: EngineConfig) -> float:
    """From the start of a fresh process to its first translation."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _START, str(checkpoint), config.device, config.precision], check=True)
    return time.perf_counter() - started


def memory_bytes(device: str) -> float:
    """Peak so far: allocated on the GPU, or resident in this process."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated(torch.device(device)))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024  # Linux counts in KiB


def device_name(device: str) -> str:
    """As the price list would call it: `H200`; on a CPU its model name and the threads used."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(torch.device(device))).removeprefix("NVIDIA ")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def fit_profile(
    timings: Sequence[Timing],
    *,
    device: str,
    model: str,
    config: EngineConfig,
    beam_size: int,
    length_step: int,
    startup_s: float,
    host_s: float,
    note: str = "",
) -> Profile:
    """All parameters at once, with standard errors. host_s: tokenizing and detokenizing, which the timings lack.

    Raises ProfileError for too few timings.
    """
    fit = _Fit.of(timings)
    costs, spread = dict(fit.costs), dict(fit.errors)
    first_step_s = costs.pop("first_step_s")
    costs["a0_s"] += first_step_s
    costs["host_s"] += host_s + costs.pop("start_s") + costs.pop("end_s")
    spread["a0_s"] = math.hypot(spread["a0_s"], spread.pop("first_step_s"))
    spread["host_s"] = math.hypot(spread["host_s"], spread.pop("start_s"), spread.pop("end_s"))
    return Profile(
        device=device,
        model=model,
        precision=config.precision,
        beam_size=beam_size,
        estimated=False,
        startup_s=startup_s,
        memory_bytes=memory_bytes(config.device),
        max_batch=min(config.max_source_slots, config.max_rows // beam_size),
        born=_birth(config, timings, note),
        errors=dict.fromkeys(PARAMETERS, 0.0) | spread,
        step_points=fit.step_points,
        read_points=fit.read_points,
        pass_points=tuple((tokens, pass_s + first_step_s) for tokens, pass_s in fit.pass_points),
        length_step=length_step,
        **costs,  # type: ignore[arg-type]  # floats, every one
    )


def expected_seconds(profile: Profile, timings: Sequence[Timing]) -> float:
    """What all of these together take by the profile."""
    seconds = 0.0
    for timing in timings:
        seconds += sum(map(profile.step_s, timing.rows, timing.target_cells)) + profile.gamma_s * timing.source_cells
        for lengths in timing.passes:
            seconds += profile.encode_s(np.array(lengths, np.float64)) + profile.host_s * len(lengths)
        seconds += profile.ending_s * (timing.num_ended > 0)
    return seconds


@dataclass(frozen=True, slots=True)
class _Fit:
    """Costs by name with standard errors, and seconds by size along the curves."""

    costs: dict[str, float]
    errors: dict[str, float]
    step_points: Points
    read_points: Points
    pass_points: Points

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> _Fit:
        """Curves of reading and of passes only where steps and passes are timed apart: in groups they cannot be told."""
        seconds = np.array([timing.seconds for timing in timings])
        rows = [np.array(timing.rows, np.float64) for timing in timings]
        cells = [np.array(timing.target_cells, np.float64) for timing in timings]
        tokens = [np.array([sum(lengths) for lengths in timing.passes], np.float64) for timing in timings]
        shared = _shared_design(timings)
        step_line = np.array([[len(each), each.sum()] for each in rows])
        read_line = np.array([[each.sum()] for each in cells])
        pass_line = np.array([[len(each), each.sum()] for each in tokens])
        straight, straight_errors = fit_costs(np.hstack([step_line, read_line, pass_line, shared]), seconds)
        knots = _knots(rows, 2.0)
        bent = [_curve(rows, knots), read_line, pass_line]
        apart = all(len(timing.rows) + len(timing.passes) <= 1 for timing in timings)
        if apart:
            read_knots, pass_knots = _quarters(cells), _knots(tokens, 4.0)
            bent[1:] = [_curve(cells, read_knots)[:, 1:], _curve(tokens, pass_knots)]
        found, errors = fit_costs(np.hstack([*bent, shared]), seconds)
        parts = [part.tolist() for part in np.split(found, np.cumsum([each.shape[1] for each in bent]))]
        # Beside a curve the line is the best one without it; without curves it is that of the fit.
        lines = straight if apart else np.concatenate([straight[:2], found[len(knots) :]])
        line_errors = straight_errors if apart else np.concatenate([straight_errors[:2], errors[len(knots) :]])
        return cls(
            costs=dict(zip(_COSTS, [*lines[: -len(_SHARED)].tolist(), *parts[3]], strict=True)),
            errors=dict(
                zip(_COSTS, [*line_errors[: -len(_SHARED)].tolist(), *errors[-len(_SHARED) :].tolist()], strict=True)
            ),
            step_points=tuple(zip(knots.tolist(), parts[0], strict=True)),
            read_points=tuple(zip(read_knots.tolist(), [0.0, *parts[1]], strict=True)) if apart else (),
            pass_points=tuple(zip(pass_knots.tolist(), parts[2], strict=True)) if apart else (),
        )


def _shared_design(timings: Sequence[Timing]) -> Floats:
    """How often each of _SHARED occurs in each timing, float64[N, K]."""
    design = []
    for timing in timings:
        squares = sum(length * length for lengths in timing.passes for length in lengths)
        started, ended = timing.num_started, timing.num_ended
        counts = [timing.source_cells, squares, sum(map(len, timing.passes)), ended > 0, started > 0, started, ended]
        design.append(counts)
    return np.array(design, np.float64)


def _knots(sizes: Sequence[Floats], ratio: float) -> Floats:
    """Sizes between which seconds are straight: the smallest and the largest seen, and those of its multiples by powers of
    `ratio` between them that some size is near.
    """
    seen = np.unique(np.concatenate(sizes))
    least, most = float(seen.min()), float(seen.max())
    multiples = least * ratio ** np.arange(int(np.log(most / least) / np.log(ratio)) + 1)
    near = np.abs(np.log2(seen / multiples[:, None])).min(1) < 0.5
    return np.unique([*multiples[near & (multiples < 0.75 * most)], most])


def _quarters(sizes: Sequence[Floats]) -> Floats:
    """0, the largest size seen, and its half, quarter and eighth."""
    return np.array([0.0, 0.125, 0.25, 0.5, 1.0]) * float(np.concatenate(sizes).max())


def _curve(sizes: Sequence[Floats], knots: Floats) -> Floats:
    """float64[N, K]: the sizes of each timing as shares of the knots beside them, added up."""
    shares = [np.stack([np.interp(each, knots, one) for one in np.eye(len(knots))], 1) for each in sizes]
    return np.array([each.sum(0) for each in shares])


def _birth(config: EngineConfig, timings: Sequence[Timing], note: str) -> Birth:
    commit = ""
    if shutil.which("git"):
        asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    num_steps, num_passes = sum(len(timing.rows) for timing in timings), sum(len(timing.passes) for timing in timings)
    method = f"measured: {num_passes} encoder passes, {num_steps} decode steps, {config.num_threads} threads"
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Birth(date, commit or "unknown", machine, f"{method}; {note}" if note else method)
