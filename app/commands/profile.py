"""Measure what a replica can do on this machine, and write it as a profile for `plan`.

Times packed encoder passes and decode steps over their sizes, the start-up of a fresh process and the memory held, and fits
the few parameters of the capacity model, with standard errors. The file says where and when it was born.

`--validate` measures the capacity model itself: profiles and live runs of the demonstration model take turns, and the
predicted p99 and highest rate are set beside the measured ones, cell by cell.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.devices import require_device
from app.precision import default_precision
from app.settings import Environment
from engine.config import PRECISIONS, EngineConfig, ModelConfig

if TYPE_CHECKING:
    from app.cost.profile import Profile
    from app.engine_timing import EngineTimer, Timing

EXAMPLES = """  babelephant profile --out cpu.json                          the demonstration model on this CPU, a minute
  babelephant profile /models/nllb-moe-54b --device cuda --precision w4a16 --out h200.json
  babelephant profile --shape paper --device cuda --precision w4a16 --out paper_h200.json
  babelephant profile --validate                              on a machine with nothing else to do, ten minutes
  babelephant plan pools.yaml --profile h200.json"""

_STEPS_OF_A_LOAD = {"cpu": 10, "cuda": 32}
_SHAPES = ("tiny", "paper", "nllb54b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="default: the demonstration model")
    model.add_argument("--shape", choices=_SHAPES, help="a random model of this shape instead")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the expert weights (default: that of a converted checkpoint, else w8a16)"
    )
    parser.add_argument("--beam-size", type=int, default=4, metavar="N", help="%(default)s")
    parser.add_argument("--max-rows", type=int, default=128, metavar="N", help="live beams the engine holds (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times every size is measured (%(default)s)")
    parser.add_argument("--name", metavar="TEXT", help="the device as the price list calls it (default: as it calls itself)")
    parser.add_argument("--note", default="", metavar="TEXT", help="kept in the birth certificate")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the profile here")
    parser.add_argument("--validate", action="store_true", help="check the capacity model against live runs, then stop")
    parser.add_argument("--validate-rounds", type=int, default=3, metavar="N", help="the median counts (%(default)s)")
    parser.add_argument(
        "--validate-sentences",
        type=int,
        default=120,
        metavar="N",
        help="long sentences of a live run at beam 4; more of short ones and at beam 1 (%(default)s)",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time instead of wall time: for a machine in use, cpu, one thread"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from app.cli import CommandError

    if (
        args.beam_size < 1
        or args.rounds < 3
        or args.max_rows < args.beam_size
        or min(args.threads, args.validate_rounds, args.validate_sentences) < 1
    ):
        raise CommandError(
            "--beam-size, --threads, --validate-rounds and --validate-sentences are at least 1, --rounds 3, "
            "--max-rows the beam size"
        )
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        raise CommandError("--cpu-time is for --device cpu and --threads 1")
    require_device(args.device)
    checkpoint = args.checkpoint or Environment.read().checkpoint
    if not args.shape:  # the first measurement is a process of its own, which could not say what is wrong so well
        ModelConfig.from_checkpoint(checkpoint)
    precision = args.precision or ("w8a16" if args.shape else default_precision(checkpoint))
    config = EngineConfig(
        device=args.device,
        precision=precision,
        max_rows=args.max_rows,
        max_source_slots=max(EngineConfig().max_source_slots, args.max_rows // args.beam_size),
        max_waiting=4096,
        num_threads=args.threads,
    )
    if args.validate:
        if args.shape:
            raise CommandError("--validate translates sentences, which a random model cannot; leave --shape out")
        from app.capacity_check import check_capacity
        from app.clocks import CpuClock, WallClock

        clock = CpuClock() if args.cpu_time else WallClock()
        report = check_capacity(checkpoint, config, args.validate_rounds, args.validate_sentences, clock)
        print(report.table())
        if args.out:
            args.out.write_text(report.to_json())
        return 0 if report.passed else 1
    profile = _profile_shape(args, config) if args.shape else _profile_checkpoint(args, checkpoint, config)
    if args.out:
        profile.save(args.out)
        print(f"written to {args.out}")
    return 0


def _profile_checkpoint(args: argparse.Namespace, checkpoint: Path, config: EngineConfig) -> Profile:
    from app.clocks import CpuClock, WallClock
    from app.engine_profile import host_seconds, start_up_seconds
    from app.engine_timing import EngineTimer
    from engine.device_runner import load_runner
    from engine.tokenizer import Tokenizer

    startup_s = start_up_seconds(checkpoint, config)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    languages = (tokenizer.languages[0], tokenizer.languages[-1])
    clock = CpuClock() if args.cpu_time else WallClock()
    model = ModelConfig.from_checkpoint(checkpoint)
    timer = EngineTimer(load_runner(checkpoint, config), model, config, args.beam_size, clock, tokenizer)
    host_s = 0.0  # on a CPU the timings hold it
    if timer.on_gpu:
        host_s = host_seconds(tokenizer, ["The file could not be saved because the disk is full."] * 200, languages, clock)
    model_name = checkpoint.name if args.checkpoint else "demonstration model"
    return _measured(args, timer, config, model_name, startup_s, host_s, "CPU time" if args.cpu_time else "")


def _profile_shape(args: argparse.Namespace, config: EngineConfig) -> Profile:
    import torch

    from app.engine_timing import EngineTimer
    from engine.bench.ours import make_runner
    from engine.bench.random_model import RandomWeights, random_transformer
    from engine.bench.shapes import SHAPES

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    transformer = random_transformer(RandomWeights(SHAPES[args.shape], torch.device(args.device)), config)
    timer = EngineTimer(make_runner(transformer, config), SHAPES[args.shape], config, args.beam_size)
    startup_s = time.perf_counter() - started
    note = "random weights of this shape; startup_s is drawing them and warming up, reading a checkpoint is not in it"
    return _measured(args, timer, config, f"shape {args.shape}", startup_s, 0.0, note)


def _measured(
    args: argparse.Namespace,
    timer: EngineTimer,
    config: EngineConfig,
    model: str,
    startup_s: float,
    host_s: float,
    note: str,
) -> Profile:
    """Measure, fit, print. host_s: what a sentence costs the host besides. Raises CommandError for a GPU's profile that is
    nonsense; on a CPU, where each step and each pass is timed alone, little can go wrong.
    """
    from app.cli import CommandError
    from app.engine_profile import device_name, fault_of, fit_profile

    timings = _measure(timer, args.rounds)
    profile = fit_profile(
        timings,
        device=args.name or device_name(args.device),
        model=model,
        config=config,
        beam_size=args.beam_size,
        length_step=timer.length_step,
        startup_s=startup_s,
        host_s=host_s,
        note="; ".join(filter(None, [note, args.note])),
    )
    print(_summary(profile))
    if timer.on_gpu and (fault := fault_of(replace(profile, host_s=max(0.0, profile.host_s - host_s)), timings)):
        raise CommandError(
            f"this profile is not to be used, so it is not written: {fault}. See with nvidia-smi that nothing else runs on "
            f"the GPU, and measure again with more --rounds (they were {args.rounds})"
        )
    return profile


def _measure(timer: EngineTimer, rounds: int) -> list[Timing]:
    """All rounds with a progress bar; a first one that only warms up is thrown away."""
    from tqdm import tqdm

    num_steps = _STEPS_OF_A_LOAD["cuda" if timer.on_gpu else "cpu"]
    kept: list[Timing] = []
    with tqdm(total=(rounds + 1) * timer.num_parts(num_steps), unit="part", desc="profile", disable=None) as bar:
        for index in range(rounds + 1):
            for timings in timer.measure(num_steps):
                kept += timings if index else []
                bar.update()
    return kept


def _summary(profile: Profile) -> str:
    """Parameters with errors, for a terminal."""
    lines = [f"{profile.model} at {profile.precision}, beam {profile.beam_size}, on {profile.device}"]
    units = {"a0_s": "per encoder pass", "a1_s": "per source token", "a2_s": "per source token and token of its sentence"}
    units |= {"tau0_s": "per decode step", "alpha_s": "per live row in it", "beta_s": "per target token read"}
    units |= {"gamma_s": "per source token read", "host_s": "per sentence outside passes and steps"}
    units |= {"ending_s": "per decode step in which sentences end"}
    for name, unit in units.items():
        lines.append(f"  {getattr(profile, name) * 1e6:>10.2f} us +- {profile.errors[name] * 1e6:<8.2f} {unit}")
    lines += [f"  step of {rows:>5.0f} rows {seconds * 1e3:>9.3f} ms, caches empty" for rows, seconds in profile.step_points]
    lines.append(f"  start-up {profile.startup_s:.1f} s, memory {profile.memory_bytes / 1e9:.2f} GB, {profile.born.method}")
    return "\n".join(lines)
