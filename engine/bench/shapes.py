"""What the benchmark runs: model shapes, the grid of batch and beam, and the paper's own ratios. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config import PRECISIONS, ModelConfig

PEERS = ("transformers", "grouped")
SOURCE_TOKENS = 24
TARGET_TOKENS = 32  # generated tokens, the forced first one included; every sentence gets exactly so many

SHAPES: Mapping[str, ModelConfig] = {
    # Small enough for seconds on a CPU; every dimension suits the packed kernels.
    "tiny": ModelConfig(
        vocab_size=1000,
        d_model=128,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=8,
    ),
    # Every other layer sparse gives 5.319 B, the paper's 5.32 B. Its model routes a token to one expert; the shapes here to
    # NLLB's two, which is what transformers runs, unless another gating is asked for.
    "paper": ModelConfig(
        vocab_size=128_000,
        d_model=1024,
        encoder_layers=24,
        decoder_layers=12,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=32,
    ),
    "nllb54b": ModelConfig(
        vocab_size=256_206,
        d_model=2048,
        encoder_layers=24,
        decoder_layers=24,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=8192,
        decoder_ffn_dim=8192,
        encoder_sparse_step=4,
        decoder_sparse_step=4,
        num_experts=128,
    ),
}


def with_gating(config: ModelConfig, experts_per_token: int | None) -> ModelConfig:
    """The same model routing each token to so many experts; None leaves it as it is."""
    return config if experts_per_token is None else replace(config, num_experts_per_tok=experts_per_token)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One point of the grid: `batch` sentences decoded together with `beam` hypotheses each."""

    batch: int
    beam: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"a cell's batch is {self.batch}; it must be at least 1")
        if not 1 <= self.beam <= 8:
            raise ValueError(f"a cell's beam is {self.beam}; choose 1 to 8")

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`96x1` is 96 sentences, beam 1. Raises ValueError."""
        match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no cell; write BATCHxBEAM, such as 96x1")
        return cls(int(match[1]), int(match[2]))

    @property
    def rows(self) -> int:
        """Live hypotheses."""
        return self.batch * self.beam

    def __str__(self) -> str:
        return f"{self.batch}x{self.beam}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run our engine: a precision of the experts, `+d8` for int8 dense layers, `+inv` for batch invariance."""

    precision: str
    int8_dense: bool = False
    batch_invariant: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`w4a16`, `w4a16+d8`, `bf16+inv`, ... Raises ValueError."""
        precision, *extras = text.strip().split("+")
        unknown = set(extras) - {"d8", "inv"}
        if precision not in PRECISIONS or unknown:
            raise ValueError(
                f"{text!r} is no precision; choose one of {', '.join(PRECISIONS)}, with +d8 (int8 dense layers) or +inv "
                "(batch-invariant) behind it if wanted"
            )
        return cls(precision, "d8" in extras, "inv" in extras)

    def __str__(self) -> str:
        return self.precision + "+d8" * self.int8_dense + "+inv" * self.batch_invariant


GRID = tuple(Cell(*pair) for pair in ((1, 1), (1, 2), (1, 4), (20, 2), (96, 1), (64, 4), (128, 4), (512, 1)))
QUICK_GRID = (Cell(1, 2), Cell(96, 1))

# int4 engine over PyTorch in fp16, input tokens/s on one V100: Table 3 of arXiv 2211.10017.
PAPER_RATIOS: Mapping[Cell, float] = {
    **{Cell(b, 1): r for b, r in ((1, 25.0), (8, 23.7), (20, 21.6), (32, 20.5), (64, 15.7), (96, 15.4))},
    **{Cell(b, 2): r for b, r in ((1, 25.8), (8, 23.4), (20, 20.2), (32, 16.0), (64, 13.6), (96, 12.7))},
}


def parse_cells(text: str) -> tuple[Cell, ...]:
    """Comma-separated cells, as asked, each once. Raises ValueError."""
    return tuple(dict.fromkeys(Cell.parse(part) for part in text.split(",")))
