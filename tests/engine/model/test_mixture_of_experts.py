"""Router rules and the grouped expert computation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from engine.model.layers import Linear
from engine.model.mixture_of_experts import MixtureOfExperts, Router
from engine.quantization.expert_stack import DenseExpertStack

CPU = torch.device("cpu")


def one_hot_router(num_experts: int, top_k: int = 2) -> Router:
    """Expert i's logit is feature i."""
    return Router(Linear(torch.eye(num_experts), None), top_k)


def random_layer(
    num_experts: int,
    d_model: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    router: Router | None = None,
    top_k: int = 2,
) -> MixtureOfExperts:
    generator = torch.Generator().manual_seed(num_experts * d_model)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    fc1 = DenseExpertStack(num_experts, width, d_model, dtype, CPU)
    fc2 = DenseExpertStack(num_experts, d_model, width, dtype, CPU)
    for expert in range(num_experts):
        fc1.set_weight(expert, draw(width, d_model))
        fc2.set_weight(expert, draw(d_model, width))
    return MixtureOfExperts(
        router=router or Router(Linear(4 * draw(num_experts, d_model), draw(num_experts)), top_k),
        fc1=fc1,
        fc1_bias=draw(num_experts, width).to(dtype),
        fc2=fc2,
        fc2_bias=draw(num_experts, d_model).to(dtype),
        output_scale=0.8,
        tokens_per_expert=torch.full((num_experts,), -1, dtype=torch.int32),
    )


def slow_layer(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, expert by expert, from the equations."""
    assert layer.router.classifier.bias is not None
    rows = []
    for token in x:
        logits = layer.router.classifier.weight @ token + layer.router.classifier.bias
        chosen = logits.topk(layer.router.top_k).indices.tolist()
        p = torch.softmax(logits, dim=0)
        total = 1.0 if len(chosen) == 1 else p[chosen].sum()  # Switch does not renormalise
        row = torch.zeros_like(token)
        for expert in chosen:
            hidden = torch.relu(layer.fc1.dequantized(expert) @ token + layer.fc1_bias[expert])
            output = layer.fc2.dequantized(expert) @ hidden + layer.fc2_bias[expert]
            row += 0.8 * p[expert] / total * output
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("num_tokens", "num_experts", "d_model", "width"), [(1, 2, 3, 5), (13, 7, 9, 4), (40, 128, 16, 8)])
def test_against_the_equations(num_tokens: int, num_experts: int, d_model: int, width: int, top_k: int) -> None:
    """128 experts and 40 tokens: most experts are empty."""
    layer = random_layer(num_experts, d_model, width, top_k=top_k)
    x = torch.randn(num_tokens, d_model, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), slow_layer(layer, x), atol=1e-6, rtol=1e-5)
    assert layer.tokens_per_expert.sum() == top_k * num_tokens


def test_one_expert_a_token_as_transformers_switch_computes_it() -> None:
    """Another model's code for the same gating: a Switch layer of transformers with the same weights, no dropout factor."""
    experts, d_model, width = 6, 16, 8
    layer = dataclasses.replace(random_layer(experts, d_model, width, top_k=1), output_scale=1.0)
    layer.fc1_bias.zero_()
    layer.fc2_bias.zero_()  # Switch has none
    assert layer.router.classifier.bias is not None
    layer.router.classifier.bias.zero_()
    config = SwitchTransformersConfig(
        d_model=d_model, d_ff=width, num_experts=experts, expert_capacity=64, dropout_rate=0.0, router_bias=False
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(layer.router.classifier.weight)
        for index in range(experts):
            theirs.experts[f"expert_{index}"].wi.weight.copy_(layer.fc1.dequantized(index))
            theirs.experts[f"expert_{index}"].wo.weight.copy_(layer.fc2.dequantized(index))
        x = torch.randn(29, d_model, generator=torch.Generator().manual_seed(5))
        expected = theirs(x[None])[0][0]
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_all_tokens_to_the_same_two_experts() -> None:
    layer = random_layer(5, 9, 4)
    x = torch.randn(1, 9, generator=torch.Generator().manual_seed(2)).repeat(33, 1)
    torch.testing.assert_close(layer(x), slow_layer(layer, x[:1]).expand(33, 9), atol=1e-6, rtol=1e-5)


def test_ties_go_to_the_lowest_index() -> None:
    expert_ids, gates = one_hot_router(5)(torch.tensor([[0.0, 3.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]]))
    assert expert_ids.tolist() == [[1, 2], [0, 1]]
    assert gates.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_one_expert_a_token_keeps_its_probability_as_gate() -> None:
    """Also with a tie, and chosen after the cast: 0.3745 and 0.3750 are one bf16 number, and its gate."""
    expert_ids, gates = one_hot_router(3, 1)(torch.tensor([[math.log(0.2), math.log(0.7), math.log(0.1)], [1.0, 1.0, 1.0]]))
    assert expert_ids.tolist() == [[1], [0]]
    torch.testing.assert_close(gates, torch.tensor([[0.7], [1 / 3]]))
    carrying = Router(Linear(torch.tensor([[0.3745], [0.3750], [0.2505]]).log(), None), 1)
    expert_ids, gates = carrying(torch.ones(1, 1, dtype=torch.bfloat16))
    assert expert_ids.tolist() == [[0]]
    assert gates.tolist() == [[0.375]]
    assert gates.dtype == torch.bfloat16


def test_the_first_expert_is_chosen_after_the_cast_to_bf16() -> None:
    """p = 0.3745 and 0.3750 are one bf16 number: expert 0 comes first though expert 1 has the larger logit."""
    x = torch.tensor([[math.log(0.3745), math.log(0.3750), math.log(0.2505)]])
    router = one_hot_router(3)
    # bf16 inputs would hide the difference, so the router's weight carries it.
    carrying = Router(Linear(x[0].unsqueeze(1).clone(), None), 2)
    expert_ids, gates = carrying(torch.ones(1, 1, dtype=torch.bfloat16))
    assert expert_ids.tolist() == [[0, 1]]
    assert gates.dtype == torch.bfloat16
    assert router(x)[0].tolist() == [[1, 0]]  # fp32 sees the difference


def test_the_second_expert_is_the_argmax_of_fp32_logits() -> None:
    """Experts 1 and 2 tie as bf16 probabilities; the logits rank 2 first."""
    carrying = Router(Linear(torch.tensor([[2.0], [1.0], [1.0005], [-4.0]]), None), 2)
    assert carrying(torch.ones(1, 1, dtype=torch.bfloat16))[0].tolist() == [[0, 2]]


def test_gates_underflow_to_zero_without_nan() -> None:
    expert_ids, gates = one_hot_router(3)(torch.tensor([[200.0, 0.0, -5.0]]))
    assert expert_ids.tolist() == [[0, 1]]
    assert gates.tolist() == [[1.0, 0.0]]


def test_an_overflowing_expert_with_gate_zero_is_not_called_in_fp16() -> None:
    layer = random_layer(3, 3, 4, dtype=torch.float16, router=Router(Linear(torch.eye(3), None), 2))
    layer.fc2_bias[1] = torch.inf
    x = torch.tensor([[200.0, 0.0, -5.0]], dtype=torch.float16)
    assert torch.isfinite(layer(x)).all()


def test_a_token_does_not_depend_on_the_routing_of_others() -> None:
    layer = random_layer(7, 16, 8)
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(layer(x)[11:12], layer(x[11:12]), atol=1e-6, rtol=0)
