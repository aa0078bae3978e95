"""A profile of the engine on this machine: its parameters, as fitted to timings, and where it was born.

Torch loads inside the functions.
"""

from __future__ import annotations

import datetime
import itertools
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.clocks import WallClock
from app.cost.profile import PARAMETERS, Birth, Profile
from app.engine_fit import Fit
from app.engine_timing import Timing
from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

_START = "from pathlib import Path; from engine.config import EngineConfig; from engine.translator import Translator; " + (
    "import sys; t = Translator.load(Path(sys.argv[1]), EngineConfig(device=sys.argv[2], precision=sys.argv[3])); "
    "t.translate(['1'], src_lang=t.languages[0], tgt_lang=t.languages[-1])"
)
# A tenth of the timings may be further off than this. On an H100 it was 4 %, where steps cost nothing it was far more.
_EXPLAINED_SHARE, _EXPLAINED_WITHIN = 0.9, 0.15


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
    fit = Fit.of(timings)
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


def fault_of(profile: Profile, timings: Sequence[Timing]) -> str | None:
    """What makes a profile nonsense beside the timings that it was fitted to, or None. Its host_s holds what they hold."""
    points = profile.step_points
    falls = [(lower, upper) for lower, upper in itertools.pairwise(points) if upper[1] < lower[1]]
    if len(points) > 1 and points[-1][1] <= points[0][1]:
        falls.append((points[0], points[-1]))
    for (fewer, fewer_s), (more, more_s) in falls:
        return (
            f"a decode step of {more:.0f} rows would take {more_s * 1e3:.3f} ms, and one of {fewer:.0f} rows "
            f"{fewer_s * 1e3:.3f} ms: more rows are never cheaper"
        )
    off = [abs(expected_seconds(profile, [timing]) / timing.seconds - 1) for timing in timings]
    worst = float(np.quantile(off, _EXPLAINED_SHARE))
    if worst > _EXPLAINED_WITHIN:
        return (
            f"{1 - _EXPLAINED_SHARE:.0%} of the timings are more than {worst:.0%} off what it says "
            f"({_EXPLAINED_WITHIN:.0%} is allowed)"
        )
    return None


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
