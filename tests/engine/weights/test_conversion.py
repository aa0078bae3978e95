"""Converted checkpoints: bit-equal to quantizing on load, atomic, and refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, QuantScheme
from engine.quantization.expert_stack import QuantizedExpertStack
from engine.weights.checkpoint import CheckpointError
from engine.weights.conversion import convert
from engine.weights.loading import load_transformer
from engine.weights.manifest import read_manifest
from engine.weights.mapping import ExpertPlace, TensorPlace, map_places
from tests.engine.tiny import TINY_EVEN, TINY_ODD, make_tiny_checkpoint

PRECISIONS = ["w8a16", "w8a16-g64", "w4a16", "w4a16-g64", "w4a16-g128"]


def scheme_of(precision: str) -> QuantScheme:
    scheme = QuantScheme.from_name(precision)
    assert scheme is not None
    return scheme


@pytest.fixture(scope="module", params=["even", "odd"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = {**TINY_EVEN, "decoder_ffn_dim": 128} if request.param == "even" else TINY_ODD
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("original"), seed=4, **overrides)
    (checkpoint / "tokenizer.json").write_text('{"pretend": true}')
    return checkpoint


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation_dtype", ["bfloat16", "float32"])
def test_loading_converted_equals_quantizing_on_load(
    original: Path, tmp_path: Path, precision: str, activation_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.model.layers.can_pack", lambda dtype, device: False)  # packed weights cannot be looked into
    convert(original, tmp_path / "out", scheme_of(precision), progress=False, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    config = EngineConfig(precision=precision, activation_dtype=activation_dtype)  # type: ignore[arg-type]
    direct, converted = load_transformer(original, config), load_transformer(tmp_path / "out", config)
    direct_places, converted_places = map_places(direct), map_places(converted)
    for name, place in direct_places.items():
        other = converted_places[name]
        if isinstance(place, ExpertPlace) and isinstance(other, ExpertPlace):
            assert isinstance(place.stack, QuantizedExpertStack) and isinstance(other.stack, QuantizedExpertStack)
            assert torch.equal(place.stack.codes[place.expert], other.stack.codes[other.expert]), name
            assert torch.equal(place.stack.scales[place.expert], other.stack.scales[other.expert]), name
        elif isinstance(place, TensorPlace) and isinstance(other, TensorPlace):
            assert torch.equal(place.destination, other.destination), name
    ids, offsets = torch.tensor([5, 9, 33, 12, 2, 7, 8]), torch.tensor([0, 5, 7])
    assert torch.equal(direct.encode(ids, offsets), converted.encode(ids, offsets))


def test_an_output_projection_of_its_own_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.layers.can_pack", lambda dtype, device: False)
    untied = make_tiny_checkpoint(tmp_path / "untied", seed=4, **TINY_ODD, tie_word_embeddings=False)
    convert(untied, tmp_path / "out", QuantScheme(4), progress=False)
    config = EngineConfig(precision="w4a16", activation_dtype="float32")
    direct, converted = load_transformer(untied, config), load_transformer(tmp_path / "out", config)
    assert torch.equal(direct.output_projection.weight, converted.output_projection.weight)
    assert not torch.equal(converted.output_projection.weight, converted.embedding)
    raw = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r'lm_head\.weight differs from model\.shared.* "tie_word_embeddings": false'):
        convert(untied, tmp_path / "tied", QuantScheme(4), progress=False)
    assert not (tmp_path / "tied").exists()


def test_one_expert_a_token_goes_the_whole_way(tmp_path: Path) -> None:
    """The gating is config.json's, which comes along; without the field, as in every older checkpoint, it is two."""
    switch = make_tiny_checkpoint(tmp_path / "switch", seed=4, **TINY_ODD, num_experts_per_tok=1)
    convert(switch, tmp_path / "out", QuantScheme(8), progress=False)
    config = EngineConfig(precision="w8a16", activation_dtype="float32")
    direct, converted = load_transformer(switch, config), load_transformer(tmp_path / "out", config)
    ids, offsets = torch.tensor([5, 9, 33, 12, 2, 7, 8]), torch.tensor([0, 5, 7])
    memory = converted.encode(ids, offsets)
    assert torch.equal(direct.encode(ids, offsets), memory)
    assert converted.encoder_load.tokens_per_expert.sum(dim=1).tolist() == [7, 7]  # one a token, in both sparse layers
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw.pop("num_experts_per_tok") == 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    two = load_transformer(tmp_path / "out", config)
    assert not torch.allclose(two.encode(ids, offsets), memory, atol=0.1)
    assert two.encoder_load.tokens_per_expert.sum(dim=1).tolist() == [14, 14]


def test_the_manifest_records_sources_and_errors(original: Path, tmp_path: Path) -> None:
    manifest = convert(original, tmp_path / "out", QuantScheme(4), progress=False)
    assert read_manifest(tmp_path / "out") == manifest
    digest = hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.source_sha256 == {"model.safetensors": digest}
    matrices = [n for n in load_file(original / "model.safetensors") if ".experts." in n and n.endswith(".weight")]
    assert sorted(manifest.relative_errors) == sorted(name.removeprefix("model.") for name in matrices)
    assert all(0.05 < error < 0.15 for error in manifest.relative_errors.values())


def test_small_files_come_along_and_weights_shrink(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "out", QuantScheme(4), progress=False)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size < 0.7 * (original / "model.safetensors").stat().st_size


def test_an_existing_directory_is_never_touched(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="choose another directory or remove it"):
        convert(original, tmp_path / "out", QuantScheme(8), progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_conversion_leaves_nothing(original: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(original / "model.safetensors")
    last = max(name for name in tensors if ".experts." in name and name.endswith(".weight"))
    tensors[last][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"{last}: the weight holds NaN or infinity"):
        convert(source, tmp_path / "out", QuantScheme(4), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_converting_twice_is_refused(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "out", QuantScheme(4), progress=False)
    with pytest.raises(CheckpointError, match="converted checkpoint already"):
        convert(tmp_path / "out", tmp_path / "again", QuantScheme(8), progress=False)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = make_tiny_checkpoint(tmp_path / "dense", seed=0, encoder_sparse_step=0, decoder_sparse_step=0)
    with pytest.raises(CheckpointError, match="has no experts"):
        convert(dense, tmp_path / "out", QuantScheme(4), progress=False)


@pytest.mark.parametrize("precision", ["w8a16", "w4a16-g64", "bf16", "fp32"])
def test_another_precision_than_the_converted_one_is_refused(original: Path, tmp_path: Path, precision: str) -> None:
    convert(original, tmp_path / "out", QuantScheme(4), progress=False)
    with pytest.raises(CheckpointError, match=r"was converted to w4a16, but .* set precision w4a16"):
        load_transformer(tmp_path / "out", EngineConfig(precision=precision))


def test_damage_to_a_converted_checkpoint_is_found(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = convert(original, out, QuantScheme(4), progress=False)
    config = EngineConfig(precision="w4a16")
    shard = out / manifest.shards[0]
    tensors = load_file(shard)
    scales = next(name for name in tensors if name.endswith(".scales"))
    save_file({name: value for name, value in tensors.items() if name != scales}, shard)
    with pytest.raises(CheckpointError, match=f"missing: {scales}"):
        load_transformer(out, config)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        load_transformer(out, config)
    shard.unlink()
    with pytest.raises(CheckpointError, match="absent"):
        load_transformer(out, config)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"precision": "w3a16"}, "damaged"),
        ({"precision": "bf16"}, "not a quantized one"),
        ({"format_version": 99}, "reads 1: convert again"),
        ({"surprise": 1}, "damaged"),
    ],
)
def test_a_manifest_that_makes_no_sense(original: Path, tmp_path: Path, edit: dict[str, object], message: str) -> None:
    convert(original, tmp_path / "out", QuantScheme(4), progress=False)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(tmp_path / "out", EngineConfig(precision="w4a16"))
