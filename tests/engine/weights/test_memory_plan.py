"""What a captured engine holds on a GPU against what was planned for it, loaded from files as a service loads."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.accounting import plan_memory
from engine.bench.checkpoint_files import write_checkpoint
from engine.bench.random_model import RandomWeights
from engine.bench.shapes import SHAPES
from engine.config import EngineConfig, QuantScheme
from engine.device_runner import DeviceRunner

# The paper's widths and vocabulary with a dense and a sparse layer a stack; written models have a head of their own.
MODEL = replace(SHAPES["paper"], encoder_layers=2, decoder_layers=2, tie_word_embeddings=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "slots", "budget", "experts_per_token"), [(512, 128, 2048, 2), (64, 64, 8192, 2), (64, 64, 8192, 1)]
)
def test_peak_is_within_5_percent_of_the_plan(
    rows: int, slots: int, budget: int, experts_per_token: int, tmp_path: Path, report_figure: Callable[[str], None]
) -> None:
    """One case is bound by the logits of many rows, the others by a large encoder pass. Peak: all that torch ever held."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = replace(MODEL, num_experts_per_tok=experts_per_token)
    write_checkpoint(RandomWeights(model, torch.device("cuda")), tmp_path / "out", QuantScheme(4))
    config = EngineConfig(
        device="cuda",
        max_rows=rows,
        max_source_slots=slots,
        max_source_tokens=256,
        max_target_tokens=256,
        encode_token_budget=budget,
    )
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    runner = DeviceRunner.load(tmp_path / "out", config)
    torch.cuda.synchronize()
    peak, planned = torch.cuda.max_memory_reserved() - before, plan_memory(model, config).total_bytes
    del runner
    report_figure(
        f"memory, {rows} rows, {budget} tokens a pass, top-{experts_per_token}: {planned / 1e9:.3f} GB planned, "
        f"{peak / 1e9:.3f} GB at the peak"
    )
    assert peak == pytest.approx(planned, rel=0.05)
