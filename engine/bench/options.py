"""What one benchmark run is asked to do. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.bench.shapes import PEERS, Cell, Variant


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to run. checkpoint None: the random model of SHAPES[shape]. limit_s: start no cell after so many seconds.

    mix_sentences 0: no serving mix; mix_rows is rounded down to whole beams.
    """

    shape: str = "tiny"
    checkpoint: Path | None = None
    device: str = "cpu"
    cells: tuple[Cell, ...] = ()
    peers: tuple[str, ...] = PEERS
    variants: tuple[Variant, ...] = (Variant("fp32"),)
    repeats: int = 3
    limit_s: float = float("inf")
    mix_sentences: int = 0
    mix_rows: int = 256
    mix_beam: int = 4
    num_threads: int = 1
    seed: int = 0
    out: Path | None = None
    command: str = ""
