"""Sparse feed-forward layer: NLLB-MoE's top-2 or Switch's top-1 router and expert matrices, no capacity limit.

Legend: T tokens, D d_model, F expert width, E experts, k = 1 or 2 active experts, A = T * k assignments.
With moe_eval_capacity_token_fraction 1.0 no token is ever dropped, so each token simply goes to its k experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.layers import Linear
from engine.quantization.expert_stack import ExpertGroups, ExpertStack

_ROW_MULTIPLE = 32  # int32: 128 bytes


@dataclass(frozen=True, slots=True)
class Router:
    """classifier: float32 weight [E, D], bias [E] or None. Computes in fp32 whatever the model's dtype. top_k: 1 or 2."""

    classifier: Linear
    top_k: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> expert_ids int64[T, k], gate_weights [T, k] in the dtype of x: two sum to 1, one is the probability.

        The first expert is the argmax of the probabilities *after* their cast to the activation dtype, the second the
        argmax of the fp32 logits without the first: in half precision the two can rank experts differently.
        """
        logits = self.classifier(x.float())
        probabilities = torch.softmax(logits, dim=-1).to(x.dtype)
        first_gate, first = probabilities.max(dim=-1, keepdim=True)
        if self.top_k == 1:
            return first, first_gate
        second = logits.scatter(1, first, float("-inf")).argmax(dim=-1, keepdim=True)
        gates = torch.cat([first_gate, probabilities.gather(1, second)], dim=1)
        total = gates.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(x.dtype).eps)
        return torch.cat([first, second], dim=1), gates / total


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """out = sum over the token's k experts of output_scale * gate * fc2_e(relu(fc1_e(x))).

    fc1 [E, F, D], fc2 [E, D, F], fc1_bias [E, F], fc2_bias [E, D]; output_scale = 1 - moe_token_dropout.
    tokens_per_expert int32[E]: every call leaves there how many tokens it gave to each expert.
    """

    router: Router
    fc1: ExpertStack
    fc1_bias: Tensor
    fc2: ExpertStack
    fc2_bias: Tensor
    output_scale: float
    tokens_per_expert: Tensor

    def pack(self) -> None:
        """See Linear.pack; expert stacks chose their layout when they were allocated."""
        self.router.classifier.pack()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        expert_ids, gates = self.router(x)
        flat_ids = expert_ids.view(-1)
        order = torch.argsort(flat_ids, stable=True)
        counts = torch.bincount(flat_ids, minlength=self.fc1.num_experts)
        self.tokens_per_expert.copy_(counts)
        groups = ExpertGroups.from_counts(counts)
        hidden = self.fc1.grouped_linear(x.index_select(0, order // self.router.top_k), self.fc1_bias, groups).relu_()
        outputs = self.fc2.grouped_linear(hidden, self.fc2_bias, groups).mul_(self.output_scale)
        return _combine(outputs, gates, order)


@dataclass(frozen=True, slots=True)
class StackLoad:
    """What the newest pass gave to the experts of one stack. layers: places of its L sparse layers, ascending;
    tokens_per_expert int32[L, E or more]: each layer writes its row, one copy reads them all. Columns past E are zero: rows
    start on 128 bytes, so that kernels compiled for aligned pointers serve every layer."""

    layers: tuple[int, ...]
    num_experts: int
    tokens_per_expert: Tensor

    @classmethod
    def allocate(cls, layers: tuple[int, ...], num_experts: int, device: torch.device) -> StackLoad:
        """All zero."""
        width = -(-num_experts // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return cls(layers, num_experts, torch.zeros((len(layers), width), dtype=torch.int32, device=device))

    def row(self, layer: int) -> Tensor:
        """int32[E] of the layer at this place in the stack, which must be sparse."""
        return self.tokens_per_expert[self.layers.index(layer), : self.num_experts]


def _combine(outputs: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    """outputs [A, D] sorted by expert, gates [T, k], order int64[A] -> [T, D].

    A sum of one or two terms does not depend on their order, so results do not depend on how other tokens were routed.
    """
    weighted = outputs.mul_(gates.view(-1).index_select(0, order).unsqueeze(1))
    if weighted.dtype == torch.float16:  # an expert with gate 0 counts as not called, also where its output overflowed
        weighted = torch.where((gates.view(-1)[order] == 0).unsqueeze(1), 0.0, weighted)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.shape[0], device=order.device)
    pairs = weighted.index_select(0, position)
    if gates.shape[1] == 1:
        return pairs
    return pairs[0::2] + pairs[1::2]
