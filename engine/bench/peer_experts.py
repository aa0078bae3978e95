"""The experts of a transformers model: one stack per layer, or drawn on use; a loop that is right, or grouped GEMMs.

Legend: T tokens, D d_model, F feed-forward width, E experts, k = 1 or 2 active experts, A = k T assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.bench.random_model import RandomWeights

_EXPERT_TENSORS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class ExpertCounts:
    """Distinct experts per router call, kept on the device until they are asked for."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self._num_experts, self._top_k = num_experts, top_k
        self._hits: dict[str, list[tuple[int, Tensor]]] = {"encoder": [], "decoder": []}

    def hook(self, stack: Literal["encoder", "decoder"]) -> Callable[..., None]:
        """A forward hook for the routers of one stack."""

        def record(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
            del module, inputs
            gates = output[1]  # [T, E], zero where a token does not go
            self._hits[stack].append((gates.shape[0], (gates != 0).any(dim=0).sum()))

        return record

    def touched(self, stack: Literal["encoder", "decoder"], num_tokens: int) -> tuple[float, float]:
        """Mean distinct experts of the calls with `num_tokens` tokens, and what uniform routing would touch."""
        hits = [int(hit) for tokens, hit in self._hits[stack] if tokens == num_tokens]
        if not hits:
            raise ValueError(f"no router call of the {stack} had {num_tokens} tokens")
        uniform = self._num_experts * (1.0 - (1.0 - self._top_k / self._num_experts) ** num_tokens)
        return sum(hits) / len(hits), uniform


@dataclass(frozen=True, slots=True)
class ExpertDraw:
    """Any tensor of one layer's experts: `fc1.weight` and so on."""

    weights: RandomWeights
    layer: str
    dtype: torch.dtype

    def __call__(self, expert: int, matrix: str, shape: tuple[int, ...]) -> Tensor:
        """Draw one."""
        name = f"{self.layer}.experts.expert_{expert}.{matrix}"
        if matrix.endswith("weight"):
            return self.weights.expert_matrix(name, (shape[0], shape[1])).dense(self.dtype)
        return self.weights.tensor(name, shape).to(self.dtype)


@torch.inference_mode()
def stack_experts(ffn: Any, draw: ExpertDraw | None = None) -> None:
    """Put the experts of a sparse layer into one tensor [E, ...] per name, `ffn.stacks`, their parameters slices of it.

    They are drawn, or (None) copied from the parameters there are.
    """
    experts = _experts_of(ffn)
    sample = ffn.router.classifier.weight
    dtype = experts[0].fc1.weight.dtype if draw is None else draw.dtype
    ffn.stacks = {}
    for name in _EXPERT_TENSORS:
        linear, parameter = name.split(".")
        shape = tuple(getattr(getattr(experts[0], linear), parameter).shape)
        stack = torch.empty((len(experts), *shape), dtype=dtype, device=sample.device)
        for index, expert in enumerate(experts):
            module = getattr(expert, linear)
            stack[index] = getattr(module, parameter) if draw is None else draw(index, name, shape)
            setattr(module, parameter, nn.Parameter(stack[index], requires_grad=False))
        ffn.stacks[name] = stack


def _experts_of(ffn: Any) -> list[Any]:
    return [ffn.experts[f"expert_{index}"] for index in range(ffn.num_experts)]  # 5.x keeps a dropout layer among them


def draw_on_use(ffn: Any, draw: ExpertDraw) -> None:
    """Experts hold nothing; before a call with tokens they are drawn, after it dropped."""
    for index, expert in enumerate(_experts_of(ffn)):
        shapes = {m: tuple(getattr(getattr(expert, m.split(".")[0]), m.split(".")[1]).shape) for m in _EXPERT_TENSORS}

        def fill(module: Any, inputs: tuple[Tensor, ...], index: int = index, shapes: Any = shapes) -> None:
            for matrix, shape in shapes.items():
                linear, name = matrix.split(".")
                tensor = draw(index, matrix, shape) if inputs[0].shape[0] else inputs[0].new_zeros(1).expand(shape)
                setattr(getattr(module, linear), name, nn.Parameter(tensor, requires_grad=False))

        def drop(module: Any, inputs: object, output: object) -> None:
            del inputs, output
            for matrix in _EXPERT_TENSORS:
                linear, name = matrix.split(".")
                setattr(getattr(module, linear), name, None)

        expert.register_forward_pre_hook(fill)
        expert.register_forward_hook(drop)


def run_every_hit_expert(experts: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What transformers 5's loop over experts is meant to do: every expert with a nonzero gate, gate * expert * 0.8."""

    def forward(hidden: Tensor, router_mask: Tensor, gates: Tensor) -> Tensor:
        del router_mask
        output = torch.zeros_like(hidden)
        for index in (gates != 0).any(dim=0).nonzero()[:, 0].tolist():
            tokens = gates[:, index].nonzero()[:, 0]
            result = experts[f"expert_{index}"](hidden[tokens]) * gates[tokens, index, None]
            output.index_add_(0, tokens, result * (1.0 - experts.moe_token_dropout))
        return output

    return forward


def first_choice_only(router: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Switch's gating for a router of transformers, which knows NLLB's only: the first choice, gate = its probability."""

    def route_tokens(
        router_logits: Tensor, input_dtype: torch.dtype = torch.float32, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        del padding_mask  # the benchmark's batches hold no padding
        probabilities = router_logits.softmax(dim=-1, dtype=torch.float32).to(input_dtype)
        mask = functional.one_hot(probabilities.argmax(dim=-1), router.num_experts)
        return mask, probabilities * mask

    return route_tokens


def grouped_layer(ffn: Any, returns_pair: bool, scale: float, top_k: int) -> Callable[..., Any]:
    """A sparse layer without a loop and without host synchronisation: sort on the device, two grouped GEMMs, one sum."""
    fc1, bias1, fc2, bias2 = (ffn.stacks[name] for name in _EXPERT_TENSORS)
    grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    every_expert = torch.arange(fc1.shape[0], device=fc1.device)
    classifier = ffn.router.classifier
    weight, bias = classifier.weight.float(), None if classifier.bias is None else classifier.bias.float()

    def forward(hidden: Tensor, padding_mask: object = None) -> Any:
        del padding_mask  # the benchmark's batches hold no padding
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = functional.linear(x.float(), weight, bias)
        probabilities = logits.softmax(dim=-1).to(x.dtype)
        gates, first = probabilities.max(dim=-1, keepdim=True)
        chosen = first
        if top_k == 2:
            second = logits.scatter(1, first, float("-inf")).argmax(dim=-1, keepdim=True)
            gates = torch.cat([gates, probabilities.gather(1, second)], dim=1)
            gates = gates / gates.sum(dim=1, keepdim=True)
            chosen = torch.cat([first, second], dim=1)
        experts, order = chosen.view(-1).sort(stable=True)
        ends = torch.searchsorted(experts, every_expert, right=True).to(torch.int32)
        rows = x.index_select(0, order // top_k)
        inner = (grouped_mm(rows, fc1.transpose(1, 2), offs=ends) + bias1.index_select(0, experts)).relu_()
        outer = grouped_mm(inner, fc2.transpose(1, 2), offs=ends) + bias2.index_select(0, experts)
        outer *= (gates * scale).view(-1).index_select(0, order).unsqueeze(1)
        pairs = torch.empty_like(outer).index_copy_(0, order, outer)
        output = (pairs if top_k == 1 else pairs.view(-1, 2, x.shape[1]).sum(dim=1)).view(hidden.shape)
        return (output, (probabilities, first)) if returns_pair else output

    return forward
