"""A profile of the engine on this machine: fits its parameters to timings and notes where it was born.

Torch loads inside the functions.
"""

from __future__ import annotations

import datetime
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

from app.cost.profile import PARAMETERS, Birth, Profile, fit_costs
from app.cost.traces import Floats
from app.engine_timing import Timing
from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

_START = "from pathlib import Path; from engine.config import EngineConfig; from engine.translator import Translator; " + (
    "import sys; t = Translator.load(Path(sys.argv[1]), EngineConfig(device=sys.argv[2], precision=sys.argv[3])); "
    "t.translate(['1'], src_lang=t.languages[0], tgt_lang=t.languages[-1])"
)


def host_seconds(tokenizer: Tokenizer, texts: Sequence[str], languages: tuple[str, str]) -> float:
    """Median time to tokenize one of `texts` and detokenize a text of its length."""
    times = []
    for text in texts:
        started = time.perf_counter()
        tokenizer.decode(tokenizer.encode(text, languages[0]).tolist())
        times.append(time.perf_counter() - started)
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
    seconds = np.array([timing.seconds for timing in timings])
    sizes = np.unique([rows for timing in timings for rows in timing.rows]).astype(np.float64)
    knots = _knots(sizes)
    names, shared = _shared_design(timings)
    rows = [np.array(timing.rows, np.float64) for timing in timings]
    curve = np.array([_between(each, knots).sum(0) for each in rows])
    found, errors = fit_costs(np.concatenate([curve, shared], 1), seconds)
    line = np.array([[len(each), each.sum()] for each in rows])
    straight, straight_errors = fit_costs(np.concatenate([line, shared], 1), seconds)
    names = ("tau0_s", "alpha_s", *names)
    costs = dict(zip(names, map(float, [*straight[:2], *found[len(knots) :]]), strict=True))
    costs["host_s"] += host_s
    return Profile(
        device=device,
        model=model,
        precision=config.precision,
        beam_size=beam_size,
        estimated=False,
        startup_s=startup_s,
        memory_bytes=memory_bytes(config.device),
        max_batch=min(config.max_source_slots, config.max_rows // beam_size),
        born=_birth(config, sum(map(len, rows)), sum(len(timing.passes) for timing in timings), note),
        errors=dict.fromkeys(PARAMETERS, 0.0)
        | dict(zip(names, map(float, [*straight_errors[:2], *errors[len(knots) :]]), strict=True)),
        step_points=tuple(zip(knots.tolist(), found[: len(knots)].tolist(), strict=True)),
        length_step=length_step,
        **costs,  # type: ignore[arg-type]  # floats, every one
    )


def _shared_design(timings: Sequence[Timing]) -> tuple[tuple[str, ...], Floats]:
    """Names of costs and how often each occurs in each timing, float64[N, K]: all but the steps' dependence on rows."""
    names = ("beta_s", "gamma_s", "a0_s", "a1_s", "a2_s", "host_s")
    design = []
    for timing in timings:
        lengths = [np.array(each, np.float64) for each in timing.passes]
        tokens, squares = (sum(float((each**power).sum()) for each in lengths) for power in (1, 2))
        num_sentences = sum(map(len, lengths))
        reading = [timing.target_cells, timing.source_cells]
        design.append([*reading, float(len(lengths)), tokens, squares, float(num_sentences)])
    return names, np.array(design)


def _knots(sizes: Floats) -> Floats:
    """Numbers of rows between which a step's seconds are straight: the smallest and the largest seen, and those doublings
    between them that some size is near.
    """
    least, most = float(sizes.min()), float(sizes.max())
    doublings = least * 2.0 ** np.arange(int(np.log2(most / least)) + 1)
    near = np.abs(np.log2(sizes / doublings[:, None])).min(1) < 0.5
    return np.unique([*doublings[near & (doublings < 0.75 * most)], most])


def _between(rows: Floats, knots: Floats) -> Floats:
    """float64[N, K]: rows float64[N] as shares of the knots beside them."""
    return np.stack([np.interp(rows, knots, one) for one in np.eye(len(knots))], 1)


def _birth(config: EngineConfig, num_steps: int, num_passes: int, note: str) -> Birth:
    commit = ""
    if shutil.which("git"):
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    method = f"measured: {num_passes} encoder passes, {num_steps} decode steps, {config.num_threads} threads"
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Birth(date, commit or "unknown", machine, f"{method}; {note}" if note else method)
