from __future__ import annotations

import pytest
import torch

from engine.bench.inputs import CellInputs
from engine.bench.ours import engine_config
from engine.bench.peers import Peer
from engine.bench.random_model import NUM_SPECIAL_TOKENS, RandomWeights, random_transformer
from engine.bench.shapes import SHAPES, Cell, Variant
from engine.config import QuantScheme
from engine.model.mixture_of_experts import MixtureOfExperts
from engine.model.transformer import Transformer
from engine.quantization.symmetric import quantize
from engine.weights.mapping import canonical_name, expected_specs, is_expert_matrix

TINY = SHAPES["tiny"]
WEIGHTS = RandomWeights(TINY, torch.device("cpu"), seed=3)
FC1 = "decoder.layers.1.ffn.experts.expert_5.fc1.weight"
FC2 = "decoder.layers.1.ffn.experts.expert_5.fc2.weight"


def model(precision: str) -> Transformer:
    config = engine_config(
        [Cell(2, 2)], device="cpu", variant=Variant(precision), source_tokens=24, target_tokens=32, num_threads=1
    )
    return random_transformer(WEIGHTS, config)


@pytest.mark.parametrize("name", [FC1, FC2])
@pytest.mark.parametrize("scheme", [QuantScheme(4), QuantScheme(8), QuantScheme(4, 64)], ids=lambda scheme: scheme.name)
def test_an_expert_matrix_is_the_same_in_every_precision(name: str, scheme: QuantScheme) -> None:
    matrix = WEIGHTS.expert_matrix(name, (48, 128))
    exact = matrix.dense(torch.float32)
    assert torch.equal(matrix.dense(torch.bfloat16).float(), exact)
    assert torch.equal(matrix.quantized(scheme).dequantize(), exact)
    assert matrix.codes.abs().max() == 7
    assert len(matrix.steps.unique()) > 1, "equal scales would hide a permuted one"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "w8a16", "w4a16"])
def test_every_engine_holds_the_drawn_numbers(precision: str) -> None:
    """CPU stacks keep layouts of their own; what they stand for must be the same matrix in all of them."""
    transformer = model(precision)
    stacks = {"encoder": transformer.encoder_layers, "decoder": transformer.decoder_layers}
    num_compared = 0
    for stack, layers in stacks.items():
        for index, layer in enumerate(layers):
            moe = layer.feed_forward
            if not isinstance(moe, MixtureOfExperts):
                continue
            for expert in range(TINY.num_experts):
                for matrix, held in (("fc1", moe.fc1), ("fc2", moe.fc2)):
                    name = f"{stack}.layers.{index}.ffn.experts.expert_{expert}.{matrix}.weight"
                    drawn = WEIGHTS.expert_matrix(name, (held.out_features, held.in_features)).dense(torch.float32)
                    assert torch.equal(held.dequantized(expert), drawn), name
                    num_compared += 1
    assert num_compared == 4 * TINY.num_experts * 2


@pytest.mark.parametrize("name", ["encoder.layers.0.ffn.fc1.weight", "decoder.layers.0.cross_attention.k_proj.weight"])
def test_dense_matrices_survive_int8_unchanged(name: str) -> None:
    matrix = WEIGHTS.tensor(name, (256, 128))
    assert torch.equal(quantize(matrix, QuantScheme(8)).dequantize(), matrix)
    assert torch.equal(matrix.bfloat16().float(), matrix)


def test_the_mean_of_relu_does_not_reach_the_next_layer() -> None:
    for name in (FC2, "decoder.layers.0.ffn.fc2.weight"):
        weight = (
            WEIGHTS.expert_matrix(name, (128, 256)).dense(torch.float32)
            if ".experts." in name
            else WEIGHTS.tensor(name, (128, 256))
        )
        assert weight.sum(dim=1).abs().max() == 0.0


def test_the_head_is_untied_and_never_names_a_special_token() -> None:
    embedding, head = (WEIGHTS.tensor(name, (TINY.vocab_size, TINY.d_model)) for name in ("shared.weight", "lm_head.weight"))
    assert torch.equal(head.half().float(), head) and torch.equal(head.bfloat16().float(), head)
    assert not head[:NUM_SPECIAL_TOKENS].any()
    similarity = torch.nn.functional.normalize(embedding) @ torch.nn.functional.normalize(head).T
    follow = similarity[NUM_SPECIAL_TOKENS:].topk(2, dim=1)
    assert follow.values.min() > 0.4
    counts = torch.bincount(follow.indices.flatten(), minlength=TINY.vocab_size)
    assert counts[NUM_SPECIAL_TOKENS:].float().std() < 0.4, "a permutation: every token follows about two others"


def test_names_and_seeds_decide_the_numbers() -> None:
    again = RandomWeights(TINY, torch.device("cpu"), seed=3)
    other = RandomWeights(TINY, torch.device("cpu"), seed=4)
    assert torch.equal(again.tensor(FC1, (8, 8)), WEIGHTS.tensor(FC1, (8, 8)))
    assert not torch.equal(other.tensor(FC1, (8, 8)), WEIGHTS.tensor(FC1, (8, 8)))
    assert not torch.equal(WEIGHTS.tensor(FC2, (8, 8)), WEIGHTS.tensor(FC1, (8, 8)))


def test_transformers_gets_the_same_weights() -> None:
    """Every name of our own loader's table, with the numbers drawn for it; drawn on use or resident makes no difference."""
    peer = Peer.random(WEIGHTS, torch.float32, resident=True)
    theirs = {canonical_name(name, has_head=True): value for name, value in peer.model.named_parameters()}
    expected = expected_specs(WEIGHTS.untied)
    assert theirs.keys() == expected.keys()
    for name, spec in expected.items():
        shape = spec.shape
        assert tuple(theirs[name].shape) == shape
        if is_expert_matrix(name):
            drawn = WEIGHTS.expert_matrix(name, (shape[0], shape[1])).dense(torch.float32)
        else:
            drawn = WEIGHTS.tensor(name, shape)
        assert torch.equal(theirs[name], drawn), name
    drawn_on_use = Peer.random(WEIGHTS, torch.float32, resident=False)
    num_held = sum(p.numel() for p in drawn_on_use.model.parameters() if not p.is_meta)
    assert num_held < sum(p.numel() for p in theirs.values()) / 2
    inputs = CellInputs.draw(TINY, Cell(3, 2))
    assert (drawn_on_use.run(inputs).token_ids == peer.run(inputs).token_ids).all()
