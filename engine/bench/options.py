"""What one benchmark run is asked to do. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.bench.shapes import PEERS, SHAPES, Cell, Variant, with_gating
from engine.config import ModelConfig


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to run. checkpoint None: the random model of SHAPES[shape]. limit_s: start no cell after so many seconds.

    experts_per_token: gating of the random model, 2 NLLB's, 1 Switch's; None: a checkpoint's own, else NLLB's.

    ablate: the cell of whose decode step a table is made, one of `cells`; None: of none.

    mix_sentences 0: no serving mix; mix_rows is rounded down to whole beams.
    """

    shape: str = "tiny"
    checkpoint: Path | None = None
    experts_per_token: int | None = None
    device: str = "cpu"
    cells: tuple[Cell, ...] = ()
    peers: tuple[str, ...] = PEERS
    variants: tuple[Variant, ...] = (Variant("fp32"),)
    repeats: int = 3
    limit_s: float = float("inf")
    ablate: Cell | None = None
    mix_sentences: int = 0
    mix_rows: int = 256
    mix_beam: int = 4
    num_threads: int = 1
    seed: int = 0
    out: Path | None = None
    command: str = ""

    @property
    def model_config(self) -> ModelConfig:
        """Of the model under test. Raises ConfigError, ValueError for a checkpoint with another gating than asked for."""
        if self.checkpoint is None:
            return with_gating(SHAPES[self.shape], self.experts_per_token)
        config = ModelConfig.from_checkpoint(self.checkpoint)
        if self.experts_per_token not in (None, config.num_experts_per_tok):
            raise ValueError(
                f"{self.checkpoint} has num_experts_per_tok {config.num_experts_per_tok} in its config.json, not "
                f"{self.experts_per_token}: leave --experts-per-token out"
            )
        return config
