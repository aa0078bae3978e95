"""The inspection report against files and state dicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import QuantScheme
from engine.weights.checkpoint import CheckpointError
from engine.weights.conversion import convert
from engine.weights.inspection import inspect_checkpoint
from tests.engine.tiny import TINY_ODD, make_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5, **TINY_ODD)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("untied"), seed=5, **TINY_ODD, tie_word_embeddings=False)


@pytest.mark.parametrize("name", ["checkpoint", "untied"])
def test_sizes_are_those_of_the_file(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Path = request.getfixturevalue(name)
    tensors = load_file(checkpoint / "model.safetensors")
    matrices = [value for name, value in tensors.items() if ".experts." in name and name.endswith(".weight")]
    report = inspect_checkpoint(checkpoint, "fp32")
    assert report.num_expert_matrices == len(matrices)
    assert report.expert_fp32_bytes == report.expert_bytes == sum(4 * value.numel() for value in matrices)
    assert report.model_fp32_bytes == report.model_bytes == sum(4 * value.numel() for value in tensors.values())
    assert report.expert_ratio == 1.0 and report.mean_error is None


def test_converted_bytes_are_the_ones_promised(checkpoint: Path, tmp_path: Path) -> None:
    """Honest bytes: what is on disk for experts is what the report says."""
    report = inspect_checkpoint(checkpoint, "w4a16")
    convert(checkpoint, tmp_path / "out", QuantScheme(4), progress=False)
    packed = [
        value.numel() * value.element_size()
        for shard in (tmp_path / "out").glob("*.safetensors")
        for name, value in load_file(shard).items()
        if name.endswith((".codes", ".scales"))
    ]
    assert sum(packed) == report.expert_bytes
    from_manifest = inspect_checkpoint(tmp_path / "out", "w4a16")
    assert from_manifest == report
    with pytest.raises(CheckpointError, match="was converted to w4a16"):
        inspect_checkpoint(tmp_path / "out", "w8a16")


def test_errors_grow_with_fewer_bits(checkpoint: Path) -> None:
    eight, four = inspect_checkpoint(checkpoint, "w8a16"), inspect_checkpoint(checkpoint, "w4a16")
    assert eight.mean_error is not None and four.mean_error is not None
    assert eight.max_error is not None and four.max_error is not None
    assert eight.mean_error <= eight.max_error < 0.02 < four.mean_error <= four.max_error < 0.15
    assert four.worst_matrix is not None and four.worst_matrix.endswith(".weight")


def test_it_prints_what_a_person_asks(checkpoint: Path) -> None:
    text = str(inspect_checkpoint(checkpoint, "w4a16"))
    for part in ("w4a16", "times smaller", "memory plan", "relative error", "expert matrices", "to 2 of 7 experts"):
        assert part in text


def test_a_broken_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="missing"):
        inspect_checkpoint(tmp_path, "w4a16")
