"""Muon for matrices, AdamW for everything else, over a few flat buffers so that a step is some twenty launches.

Parameters compute in `compute_dtype` (bf16 on a GPU); the master copy, momentum and Adam moments are fp32.
Muon (K. Jordan 2024): momentum, then the nearest semi-orthogonal matrix by five Newton-Schulz steps; update scale
0.2 * sqrt(max(rows, columns)) as in Moonlight (2025), which makes one learning rate fit both parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the Muon write-up: fast, not exact, convergence


@dataclass(frozen=True, slots=True)
class _Buffer:
    """One storage shared by parameters: weight and grad in the compute dtype, master and moments in fp32."""

    weight: Tensor
    grad: Tensor
    master: Tensor
    first: Tensor
    second: Tensor | None


class MuonAdamW:
    """Re-homes the parameters of `network` into flat buffers and updates them.

    Three-dimensional parameters [n, rows, columns] are n matrices (Muon); all others are vectors (AdamW).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        compute_dtype: torch.dtype,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        clip_norm: float = 1.0,
    ) -> None:
        self.weight_decay, self.momentum, self.betas, self.clip_norm = weight_decay, momentum, betas, clip_norm
        matrices: dict[tuple[int, int], list[nn.Parameter]] = {}
        vectors: list[nn.Parameter] = []
        for parameter in network.parameters():
            if parameter.dim() == 3:
                matrices.setdefault((parameter.shape[1], parameter.shape[2]), []).append(parameter)
            else:
                vectors.append(parameter)
        self._matrices = [self._rehome(group, shape, compute_dtype, adam=False) for shape, group in matrices.items()]
        self._vectors = self._rehome(vectors, None, compute_dtype, adam=True)
        self.num_steps = torch.zeros((), device=self._vectors.weight.device)

    def _rehome(
        self, parameters: list[nn.Parameter], shape: tuple[int, int] | None, dtype: torch.dtype, *, adam: bool
    ) -> _Buffer:
        master = torch.cat([p.detach().float().reshape(-1, *(shape or ())) for p in parameters])
        buffer = _Buffer(
            weight=master.to(dtype),
            grad=torch.zeros_like(master, dtype=dtype),
            master=master,
            first=torch.zeros_like(master),
            second=torch.zeros_like(master) if adam else None,
        )
        begin = 0
        for parameter in parameters:
            length = parameter.shape[0] if shape else parameter.numel()
            parameter.data = buffer.weight[begin : begin + length].view(parameter.shape)
            # backward adds into this view, so gradients of one shape lie together without a copy
            parameter.grad = buffer.grad[begin : begin + length].view(parameter.shape)
            begin += length
        return buffer

    def _buffers(self) -> Iterator[_Buffer]:
        yield from self._matrices
        yield self._vectors

    def zero_grad(self) -> None:
        """Zero the gradient buffers in place."""
        for buffer in self._buffers():
            buffer.grad.zero_()

    @torch.no_grad()
    def step(self, learning_rate: Tensor) -> None:
        """One update with learning_rate (scalar tensor on the device, so that a captured step can change it)."""
        self.num_steps += 1
        for buffer in self._matrices:
            gradient = buffer.grad.float()
            buffer.first.lerp_(gradient, 1.0 - self.momentum)
            update = orthogonalize(torch.lerp(gradient, buffer.first, self.momentum))
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            buffer.master.mul_(1.0 - learning_rate * self.weight_decay).sub_(update.float() * (learning_rate * scale))
            buffer.weight.copy_(buffer.master)
        buffer, (beta1, beta2) = self._vectors, self.betas
        assert buffer.second is not None
        gradient = buffer.grad.float()
        gradient = gradient * (self.clip_norm / gradient.norm().clamp(min=self.clip_norm))
        buffer.first.lerp_(gradient, 1.0 - beta1)
        buffer.second.lerp_(gradient * gradient, 1.0 - beta2)
        denominator = (buffer.second / (1.0 - beta2**self.num_steps)).sqrt_().add_(1e-9)
        buffer.master.sub_(learning_rate * (buffer.first / (1.0 - beta1**self.num_steps)) / denominator)
        buffer.weight.copy_(buffer.master)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later run needs to continue exactly."""
        state = {"num_steps": self.num_steps}
        for index, buffer in enumerate(self._buffers()):
            state |= {f"{index}.master": buffer.master, f"{index}.first": buffer.first}
            if buffer.second is not None:
                state[f"{index}.second"] = buffer.second
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; raises KeyError or RuntimeError when the network differs."""
        self.num_steps.copy_(state["num_steps"])
        for index, buffer in enumerate(self._buffers()):
            buffer.master.copy_(state[f"{index}.master"])
            buffer.first.copy_(state[f"{index}.first"])
            if buffer.second is not None:
                buffer.second.copy_(state[f"{index}.second"])
            buffer.weight.copy_(buffer.master)

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Take weights written into the parameters from outside (a checkpoint) as the new master copy."""
        for buffer in self._buffers():
            buffer.master.copy_(buffer.weight)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices: float[n, rows, columns] -> bf16, singular values near 1."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)).to(torch.bfloat16)
    x = x.transpose(1, 2) if tall else x
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x
