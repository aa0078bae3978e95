"""What one training is: torch-free, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """`total_seconds` sets the learning-rate schedule over all runs together; `run_seconds` ends this run (None: at
    total_seconds). Learning rate: linear warm-up, constant to `decay_from` of the total, then linear to 0.
    """

    corpus: Path  # texts.jsonl.gz of the corpus builder
    tokenizer: Path  # directory with tokenizer.json
    out: Path
    total_seconds: float
    run_seconds: float | None = None
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    decay_from: float = 0.3
    weight_decay: float = 0.05
    rows: int = 256
    dropout: float = 0.1
    label_smoothing: float = 0.1
    balance_weight: float = 0.01
    cldr_share: float = 0.25
    pivot_weight: float = 4.0
    seed: int = 20261124
    device: str = "cuda"
    compile: bool = True
    validate_every_s: float = 60.0
    pool_pairs: int = 1 << 20
    num_variants: int = 4
    bpe_dropout: float = 0.1
