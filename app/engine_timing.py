"""Times the engine on this machine and fits a profile to the timings. Torch loads inside the functions.

Legend: B sentences, s source tokens, b beam size, R = B b live rows.
"""

from __future__ import annotations

import datetime
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.cost.profile import Birth, Profile, fit_costs
from engine.config import EngineConfig, ModelConfig

if TYPE_CHECKING:
    from engine.device_runner import DeviceRunner
    from engine.runner import Runner
    from engine.tokenizer import Tokenizer

_SOURCE_TOKENS = (8, 24, 64)
_WARM_UP_STEPS = 2
_NUM_RESERVED_IDS = 4  # bos, pad, eos, unk
_START = "from pathlib import Path; from engine.config import EngineConfig; from engine.translator import Translator; " + (
    "import sys; t = Translator.load(Path(sys.argv[1]), EngineConfig(device=sys.argv[2], precision=sys.argv[3])); "
    "t.translate(['1'], src_lang=t.languages[0], tgt_lang=t.languages[-1])"
)


class WallClock:
    """Seconds as they pass."""

    def now(self) -> float:
        """Seconds since some instant."""
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class CpuClock(WallClock):
    """Seconds of CPU time of this process; waiting costs nothing and passes at once. On a machine that others use, this is
    what one thread would take if it had its core to itself (but for the caches).
    """

    def __init__(self) -> None:
        self._waited_s = 0.0

    def now(self) -> float:
        """CPU time, and what was waited."""
        return time.process_time() + self._waited_s

    def wait(self, seconds: float) -> None:
        """Pass over so many seconds."""
        self._waited_s += seconds


@dataclass(frozen=True, slots=True)
class EncodeTiming:
    """One admission: an encoder pass over B sentences of s tokens, and what it adds to the next two decode steps."""

    sentences: int
    source_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One decode step of R live rows with so many target tokens in their caches."""

    rows: int
    cached_tokens: int
    seconds: float


class EngineTimer:
    """A runner and the sizes that fit it. The model may be any: sentences are random ids, and every one decodes to its
    limit.
    """

    def __init__(
        self,
        runner: Runner | DeviceRunner,
        model: ModelConfig,
        config: EngineConfig,
        beam_size: int,
        clock: WallClock | None = None,
    ) -> None:
        self._runner, self._model, self._config = runner, model, config
        self._now = (clock or WallClock()).now
        self.beam_size = beam_size
        most = min(config.max_source_slots, config.max_rows // beam_size)
        self.batches = sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})
        self._rng = np.random.default_rng(0)

    @property
    def num_cells(self) -> int:
        """Cells of one round of `measure`."""
        return len(self.batches) * (len(self._lengths()) + 1)

    def _lengths(self) -> list[int]:
        return [length for length in _SOURCE_TOKENS if length <= self._config.max_source_tokens]

    def measure(self, num_steps: int) -> Iterator[EncodeTiming | StepTiming]:
        """One round over all cells, each encoder pass once and num_steps decode steps, from the first on, per batch size."""
        for batch in self.batches:
            for length in self._lengths():
                if batch * length <= self._config.encode_token_budget:
                    yield EncodeTiming(batch, length, self._admit(batch, length))
            rows = batch * self.beam_size
            for position, seconds in enumerate(self._decode(batch, num_steps), _WARM_UP_STEPS):
                yield StepTiming(rows, rows * position, seconds)

    def _encode(self, batch: int, length: int) -> float:
        from engine.batching import pack

        ids = self._rng.integers(_NUM_RESERVED_IDS, self._model.vocab_size, (batch, length)).astype(np.int32)
        ids[:, -1] = self._model.eos_token_id
        packed = pack(list(ids), range(batch))
        self._synchronize()
        started = self._now()
        self._runner.encode(packed)
        self._synchronize()
        return self._now() - started

    def _admit(self, batch: int, length: int) -> float:
        """The pass, and by how much the first decode steps after it (cold caches) exceed the later ones."""
        encode_s = self._encode(batch, length)
        first, second, *later = self._steps(batch, _WARM_UP_STEPS + 4)
        return encode_s + max(0.0, first + second - 2 * float(np.median(later)))

    def _decode(self, batch: int, num_steps: int) -> list[float]:
        """Steps of sentences just encoded; the first ones, which `_admit` counts, are left out."""
        self._encode(batch, min(24, self._config.max_source_tokens))
        return self._steps(batch, num_steps + _WARM_UP_STEPS)[_WARM_UP_STEPS:]

    def _steps(self, batch: int, num_steps: int) -> list[float]:
        """Seconds of the first decode steps of sentences that are encoded; fewer when the engine's limit is lower."""
        from engine.search.spec import SearchSpec
        from engine.types import SearchOptions

        most = self._config.max_target_tokens
        options = SearchOptions(beam_size=self.beam_size, max_target_tokens=most, min_target_tokens=most)
        rows = [tuple(range(slot * self.beam_size, (slot + 1) * self.beam_size)) for slot in range(batch)]
        self._runner.start([SearchSpec(slot, rows[slot], _NUM_RESERVED_IDS, most, options) for slot in range(batch)])
        times = []
        for _ in range(min(num_steps, most - 2)):
            self._synchronize()
            started = self._now()
            self._runner.decode()
            self._synchronize()
            times.append(self._now() - started)
        self._runner.clear()
        return times

    def _synchronize(self) -> None:
        if self._config.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(torch.device(self._config.device))


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
    encodes: Sequence[EncodeTiming],
    steps: Sequence[StepTiming],
    *,
    device: str,
    model: str,
    config: EngineConfig,
    beam_size: int,
    startup_s: float,
    host_s: float,
    note: str = "",
) -> Profile:
    """The parameters with standard errors, and the medians of the steps. Raises ProfileError for too few timings."""
    sentences = np.array([timing.sentences for timing in encodes], np.float64)
    tokens = np.array([timing.source_tokens for timing in encodes], np.float64)
    design = np.stack([np.ones_like(tokens), sentences * tokens, sentences * tokens**2], 1)
    encode, encode_errors = fit_costs(design, np.array([timing.seconds for timing in encodes]))
    rows = np.array([timing.rows for timing in steps], np.float64)
    seconds = np.array([timing.seconds for timing in steps])
    cached = np.array([timing.cached_tokens for timing in steps], np.float64)
    decode, decode_errors = fit_costs(np.stack([np.ones_like(rows), rows, cached], 1), seconds)
    empty = np.maximum(seconds - decode[2] * cached, 0.0)
    errors = zip(("a0_s", "a1_s", "a2_s", "tau0_s", "alpha_s", "beta_s"), [*encode_errors, *decode_errors], strict=True)
    return Profile(
        device=device,
        model=model,
        precision=config.precision,
        beam_size=beam_size,
        estimated=False,
        a0_s=float(encode[0]),
        a1_s=float(encode[1]),
        a2_s=float(encode[2]),
        tau0_s=float(decode[0]),
        alpha_s=float(decode[1]),
        startup_s=startup_s,
        memory_bytes=memory_bytes(config.device),
        max_batch=min(config.max_source_slots, config.max_rows // beam_size),
        born=_birth(config, len(encodes), len(steps), note),
        errors={name: float(error) for name, error in errors},
        step_points=tuple((float(size), float(np.median(empty[rows == size]))) for size in np.unique(rows)),
        host_s=host_s,
        beta_s=float(decode[2]),
    )


def _birth(config: EngineConfig, num_encodes: int, num_steps: int, note: str) -> Birth:
    commit = ""
    if shutil.which("git"):
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    method = f"measured: {num_encodes} encoder passes, {num_steps} decode steps, {config.num_threads} threads"
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Birth(date, commit or "unknown", machine, f"{method}; {note}" if note else method)
