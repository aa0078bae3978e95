"""Loading: every accepted form gives the same model, every damaged one an error that names the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import NllbMoeForConditionalGeneration

from engine.accounting import plan_memory
from engine.config import ConfigError, EngineConfig, ModelConfig
from engine.model.transformer import Transformer
from engine.weights.checkpoint import CheckpointError, shard_paths
from engine.weights.loading import load_transformer
from engine.weights.mapping import map_places
from engine.weights.memory import InsufficientMemoryError, available_bytes, check_memory
from tests.engine.tiny import TINY_EVEN, TINY_ODD, load_hf_model, make_tiny_checkpoint

FP32 = EngineConfig(precision="fp32", max_source_tokens=16, max_target_tokens=16)
MATRIX = "model.encoder.layers.1.ffn.experts.expert_2.fc1.weight"


@pytest.fixture(autouse=True)
def _plain_linear_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights cannot be looked into."""
    monkeypatch.setattr("engine.model.layers.can_pack", lambda dtype, device: False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("original"), seed=3, **TINY_ODD)


@pytest.fixture
def edited(original: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """Write a copy of `original` whose tensors went through an edit."""

    def write(edit: Callable[[dict[str, Tensor]], None]) -> Path:
        tensors = load_file(original / "model.safetensors")
        edit(tensors)
        save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
        return tmp_path

    return write


def stored(transformer: Transformer) -> dict[str, Tensor]:
    """Everything that was loaded, by checkpoint name."""
    places = map_places(transformer)
    return {
        name: place.stack.dequantized(place.expert) if hasattr(place, "stack") else place.destination.clone()
        for name, place in places.items()
    }


def assert_same(checkpoint: Path, original: Path) -> None:
    expected, actual = stored(load_transformer(original, FP32)), stored(load_transformer(checkpoint, FP32))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_every_tensor_arrives_in_its_place(original: Path) -> None:
    model = load_hf_model(original)
    loaded = stored(load_transformer(original, FP32))
    named = {name.removeprefix("model."): value for name, value in model.named_parameters()}
    assert loaded.keys() == named.keys()
    for name, value in named.items():
        assert torch.equal(loaded[name], value), name


def test_fused_projections_keep_the_order_of_queries_keys_values(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    transformer = load_transformer(original, FP32)
    prefix = "model.decoder.layers.1"
    fused = transformer.decoder_layers[1].self_attention.qkv.weight
    assert torch.equal(fused, torch.cat([tensors[f"{prefix}.self_attn.{p}_proj.weight"] for p in "qkv"]))
    cross = transformer.decoder_layers[1].cross_attention.key_value
    assert torch.equal(cross.bias, torch.cat([tensors[f"{prefix}.cross_attention.{p}_proj.bias"] for p in "kv"]))


def test_the_vocabulary_is_padded_with_zeros(original: Path) -> None:
    embedding = load_transformer(original, FP32).embedding
    assert embedding.shape == (64, 36) and embedding[53:].eq(0.0).all() and embedding[52].ne(0.0).all()


def test_names_without_prefix(original: Path, edited: Callable[..., Path]) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert_same(edited(strip), original)


def test_identical_tied_copies_are_tolerated(original: Path, edited: Callable[..., Path]) -> None:
    def add_copies(tensors: dict[str, Tensor]) -> None:
        for name in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"):
            tensors[name] = tensors["model.shared.weight"].clone()

    assert_same(edited(add_copies), original)


def test_an_untied_copy_is_refused(edited: Callable[..., Path]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.shared.weight"] + 1e-3

    with pytest.raises(CheckpointError, match=r'lm_head\.weight differs from model\.shared.* "tie_word_embeddings": false'):
        load_transformer(edited(add), FP32)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "untied", seed=3, **TINY_ODD, tie_word_embeddings=False)


def test_an_output_projection_of_its_own(untied: Path) -> None:
    transformer, tensors = load_transformer(untied, FP32), load_file(untied / "model.safetensors")
    head = transformer.output_projection.weight
    assert torch.equal(head[:53], tensors["lm_head.weight"])
    assert head.shape == (64, 36) and head[53:].eq(0.0).all()
    assert torch.equal(transformer.embedding[:53], tensors["model.shared.weight"])
    assert not torch.equal(head, transformer.embedding)


def test_what_does_not_fit_a_model_with_its_own_output_projection_is_named(untied: Path) -> None:
    tensors = load_file(untied / "model.safetensors")
    head, embedding = tensors["lm_head.weight"], tensors["model.shared.weight"]

    def load(**changes: Tensor | None) -> Transformer:
        changed = {**tensors, **{name.replace("__", "."): value for name, value in changes.items()}}
        save_file({n: t.clone() for n, t in changed.items() if t is not None}, untied / "model.safetensors")
        return load_transformer(untied, FP32)

    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load(lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"wrong shape: lm_head\.weight is \(52, 36\), not \(53, 36\)"):
        load(lm_head__weight=head[:52])
    with pytest.raises(CheckpointError, match=r"unknown: lm_head\.bias"):
        load(lm_head__bias=head[:, 0])
    with pytest.raises(CheckpointError, match=r"stored twice: lm_head\.weight"):
        load(model__lm_head__weight=head)
    for name in ("model__encoder__embed_tokens__weight", "model__decoder__embed_tokens__weight"):
        assert torch.equal(load(**{name: embedding}).output_projection.weight[:53], head)  # a copy of the embedding still
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight differs from model\.shared.* share one embedding"):
            load(**{name: head})


def test_sharded_safetensors(original: Path, tmp_path: Path) -> None:
    NllbMoeForConditionalGeneration.from_pretrained(original).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(shard_paths(tmp_path)) > 3
    assert_same(tmp_path, original)
    shard_paths(tmp_path)[1].unlink()
    with pytest.raises(CheckpointError, match=r"names shards that are not there: model-00002"):
        load_transformer(tmp_path, FP32)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_bin(original: Path, tmp_path: Path, sharded: bool) -> None:
    tensors = load_file(original / "model.safetensors")
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    if sharded:
        names = sorted(tensors)
        weight_map = {}
        for shard, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-0000{shard + 1}-of-00002.bin"
            torch.save({name: tensors[name] for name in part}, tmp_path / file)
            weight_map.update(dict.fromkeys(part, file))
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, original)


@pytest.mark.parametrize("name", [MATRIX, "model.shared.weight", "model.decoder.layers.0.cross_attention.k_proj.bias"])
def test_a_missing_tensor(edited: Callable[..., Path], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"missing: {name.removeprefix('model.')}"):
        load_transformer(edited(lambda tensors: tensors.pop(name)), FP32)


def test_an_unknown_tensor(edited: Callable[..., Path]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.encoder.layers.1.ffn.experts.expert_9.fc1.weight"] = tensors[MATRIX].clone()
        tensors["model.encoder.layers.0.adapter"] = torch.ones(3)

    with pytest.raises(
        CheckpointError, match=r"unknown: model.encoder.layers.0.adapter, model.encoder.layers.1.ffn.experts.expert_9"
    ):
        load_transformer(edited(add), FP32)


def test_the_same_tensor_with_and_without_prefix(edited: Callable[..., Path]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[MATRIX.removeprefix("model.")] = tensors[MATRIX].clone()

    with pytest.raises(CheckpointError, match=r"stored twice: encoder\.layers.1.ffn.experts.expert_2.fc1.weight"):
        load_transformer(edited(add), FP32)


def test_a_wrong_shape(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"wrong shape: .*fc1.weight is \(36, 44\), not \(44, 36\)"):
        load_transformer(edited(lambda tensors: tensors.update({MATRIX: tensors[MATRIX].T.contiguous()})), FP32)


def test_a_wrong_dtype(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"wrong dtype: .*fc1.weight is I32, not float"):
        load_transformer(edited(lambda tensors: tensors.update({MATRIX: tensors[MATRIX].int()})), FP32)


def test_a_weight_that_is_not_finite(edited: Callable[..., Path]) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[MATRIX][3, 3] = torch.nan

    with pytest.raises(CheckpointError, match=r"expert_2.fc1.weight: the weight holds NaN"):
        load_transformer(edited(poison), EngineConfig(precision="w4a16"))


def test_long_lists_are_cut(edited: Callable[..., Path]) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"missing: .*, and \d+ more$"):
        load_transformer(edited(drop), FP32)


def test_other_half_precision_weights_load(original: Path, edited: Callable[..., Path]) -> None:
    half = edited(lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}))
    expected = load_file(original / "model.safetensors")["model.shared.weight"].half().float()
    assert torch.equal(load_transformer(half, FP32).embedding[:53], expected)


@pytest.mark.parametrize("keep", [0, 7, 2000, -1])
def test_a_truncated_safetensors_file(original: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((original / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged, cut short"):
        load_transformer(tmp_path, FP32)


@pytest.mark.parametrize("keep", [0, 5000])
def test_a_truncated_bin_file(original: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    torch.save(load_file(original / "model.safetensors"), tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged, cut short"):
        load_transformer(tmp_path, FP32)


def test_a_bin_file_that_is_no_state_dict(original: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    torch.save({"model": {"shared.weight": torch.ones(2)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain state dict"):
        load_transformer(tmp_path, FP32)


def test_directories_that_hold_no_model(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        load_transformer(tmp_path, FP32)
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no weights; expected one of model\.safetensors"):
        load_transformer(tmp_path, FP32)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match="is not a weight index"):
        load_transformer(tmp_path, FP32)


def test_another_number_of_experts_in_config_json(original: Path, edited: Callable[..., Path]) -> None:
    checkpoint = edited(lambda tensors: None)
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**raw, "num_experts": 6}))
    with pytest.raises(CheckpointError, match=r"unknown: .*expert_6.*wrong shape: .*router"):
        load_transformer(checkpoint, FP32)


@pytest.mark.parametrize("value", [0, 3, "1", 1.0, [1]])
def test_other_gatings_than_one_and_two_experts_are_refused(
    original: Path, edited: Callable[..., Path], value: object
) -> None:
    checkpoint = edited(lambda tensors: None)
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**raw, "num_experts_per_tok": value}))
    with pytest.raises(
        ConfigError, match=r"num_experts_per_tok is .*; this engine computes only 1 \(Switch\) and 2 \(NLLB\)"
    ):
        load_transformer(checkpoint, FP32)


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_one_expert_alone_cannot_be_routed_to(experts_per_token: int) -> None:
    with pytest.raises(ConfigError, match="num_experts is 1; routing needs at least 2"):
        ModelConfig(**{**TINY_EVEN, "num_experts": 1, "num_experts_per_tok": experts_per_token})


def test_memory_is_checked_before_weights_are_read(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.weights.loading.available_bytes", lambda device: 1_000_000)
    with pytest.raises(InsufficientMemoryError, match=r"fp32 needs .* but 0.00 GB are available; no precision would fit"):
        load_transformer(original, EngineConfig(precision="fp32"))


def test_the_memory_error_says_what_would_fit() -> None:
    wide = {"d_model": 2048, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192, "num_experts": 128}
    config = ModelConfig(**{**TINY_EVEN, **wide})
    engine_config = EngineConfig(precision="bf16", device="cuda")
    with pytest.raises(InsufficientMemoryError, match=r"precisions that would fit: w4a16, w4a16-g128, w4a16-g64 \("):
        check_memory(config, engine_config, 9 * 10**9)
    check_memory(config, engine_config, None)
    check_memory(config, EngineConfig(precision="w4a16", device="cuda"), 9 * 10**9)


def test_the_logits_of_ngram_rules_are_held_back() -> None:
    """Nobody may ever ask for such a rule; on a card that is full without them the first who does would be sent away."""
    config = ModelConfig(**{**TINY_EVEN, "vocab_size": 256_256})
    engine_config = EngineConfig(precision="w4a16", device="cuda", max_rows=320, max_source_slots=80)
    plan = plan_memory(config, engine_config)
    enough = plan.total_bytes + plan.driver_bytes + 2 * 400 * 256_256 * 4
    check_memory(config, engine_config, enough)
    with pytest.raises(InsufficientMemoryError, match=r"n-gram rules 0\.82 GB"):
        check_memory(config, engine_config, enough - 1)


def test_this_machine_has_memory() -> None:
    available = available_bytes(torch.device("cpu"))
    assert available is None or available > 10**7
