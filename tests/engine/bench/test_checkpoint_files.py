"""Random checkpoints as files: what loads is what was drawn, and the converter takes the fp16 one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.bench.checkpoint_files import write_checkpoint
from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine
from engine.bench.random_model import RandomWeights, random_transformer
from engine.bench.shapes import SHAPES, Cell
from engine.config import EngineConfig, QuantScheme
from engine.model.transformer import Transformer
from engine.quantization.symmetric import quantize
from engine.runner import Runner
from engine.weights.conversion import convert
from engine.weights.loading import load_transformer
from engine.weights.mapping import ExpertPlace, TensorPlace, map_places

WEIGHTS = RandomWeights(SHAPES["tiny"], torch.device("cpu"), seed=3)


@pytest.fixture(autouse=True)
def plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that can be looked into: not in the layout of the CPU's library."""
    monkeypatch.setattr("engine.model.layers.can_pack", lambda dtype, device: False)
    monkeypatch.setattr("engine.quantization.cpu_experts.can_pack", lambda dtype, device: False)


def assert_holds_what_was_drawn(transformer: Transformer, *, exact_experts: bool) -> None:
    for name, place in map_places(transformer).items():
        if isinstance(place, TensorPlace):
            error = (place.destination.float() - WEIGHTS.tensor(name, place.shape)).abs().max()
            assert error <= 2.0**-24, name  # fp16 has no finer steps near zero
            continue
        assert isinstance(place, ExpertPlace)
        drawn = WEIGHTS.expert_matrix(name, (place.shape[0], place.shape[1])).dense(torch.float32)
        if not exact_experts:
            drawn = quantize(drawn, QuantScheme(4)).dequantize()
        assert torch.equal(place.stack.dequantized(place.expert), drawn), name


def test_an_fp16_checkpoint_loads_and_converts(tmp_path: Path) -> None:
    num_bytes = write_checkpoint(WEIGHTS, tmp_path / "fp16", None, max_shard_bytes=1 << 20)
    shards = sorted((tmp_path / "fp16").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert num_bytes <= sum(path.stat().st_size for path in shards) < num_bytes + 200_000
    assert_holds_what_was_drawn(load_transformer(tmp_path / "fp16", EngineConfig(precision="fp32")), exact_experts=True)
    convert(tmp_path / "fp16", tmp_path / "converted", QuantScheme(4), progress=False)
    config = EngineConfig(precision="w4a16", activation_dtype="float32")
    assert_holds_what_was_drawn(load_transformer(tmp_path / "converted", config), exact_experts=False)


@pytest.mark.parametrize("scheme", [QuantScheme(4), QuantScheme(4, 64), QuantScheme(8)])
def test_a_quantized_checkpoint_is_written_without_rounding(tmp_path: Path, scheme: QuantScheme) -> None:
    num_bytes = write_checkpoint(WEIGHTS, tmp_path / "out", scheme, max_shard_bytes=1 << 20)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert num_bytes < 4_300_000 if scheme.bits == 4 else num_bytes > 4_300_000
    config = EngineConfig(precision=scheme.name, activation_dtype="float32")
    assert_holds_what_was_drawn(load_transformer(tmp_path / "out", config), exact_experts=True)


def test_a_written_model_is_the_one_that_the_benchmark_draws(tmp_path: Path) -> None:
    """Its tokens do not repeat: the output projection is its own."""
    config = EngineConfig(precision="w4a16", activation_dtype="float32", max_rows=4, max_source_slots=4)
    write_checkpoint(WEIGHTS, tmp_path / "out", QuantScheme(4))
    inputs = CellInputs.draw(WEIGHTS.config, Cell(4, 1))
    drawn, loaded = random_transformer(WEIGHTS, config), load_transformer(tmp_path / "out", config)
    tokens = [OurEngine(Runner(one, config), config).run(inputs).token_ids for one in (drawn, loaded)]
    assert (tokens[0] == tokens[1]).all()
    assert min(len(set(row)) for row in tokens[0].tolist()) > tokens[0].shape[1] // 2


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_checkpoint(WEIGHTS, tmp_path, None)
    assert not list(tmp_path.iterdir())
