"""The trainable twin of an NLLB-MoE model: same equations as the engine's, laid out for fast training on one GPU.

With 8-16 small experts, computing every expert for every token as two wide GEMMs and masking by the gates costs four times
the arithmetic of a sparse layer, but no permutation and no small launches; at d_model 256 that is the faster choice, and
its gradients are those of the sparse layer (a masked gate is exactly 0).

Legend: B rows, W positions, N = B * W, D d_model, F d_ff, E experts, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.demo.training.batches import IGNORED_LABEL, Batch


def sinusoidal_positions(num: int, d_model: int, pad_id: int) -> Tensor:
    """Position table float32[num, D] of NLLB-MoE: all sines, then all cosines; row `pad_id` zero."""
    half = d_model // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angle = torch.arange(num, dtype=torch.float32)[:, None] * frequency[None, :]
    table = torch.cat([angle.sin(), angle.cos()], dim=1)
    table[pad_id] = 0.0
    return table


_LayerFunction = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head attention; `weight` float[3 or 1+2, D, D] packs q, k, v (self) so that self-attention is one GEMM."""

    def __init__(self, d_model: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.num_heads, self.cross = num_heads, cross
        self.qkv_weight = nn.Parameter(torch.randn(3, d_model, d_model) * d_model**-0.5)
        self.qkv_bias = nn.Parameter(torch.zeros(3, d_model))
        self.out_weight = nn.Parameter(torch.randn(1, d_model, d_model) * d_model**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor) -> Tensor:
        """x [B, W, D], memory [B, W, D] for cross attention, mask additive [B, 1, W, W] -> [B, W, D]."""
        rows, width, d_model = x.shape
        weight, bias = self.qkv_weight, self.qkv_bias
        if memory is None:
            q, k, v = F.linear(x, weight.reshape(3 * d_model, d_model), bias.reshape(-1)).chunk(3, dim=-1)
        else:
            q = F.linear(x, weight[0], bias[0])
            k, v = F.linear(memory, weight[1:].reshape(2 * d_model, d_model), bias[1:].reshape(-1)).chunk(2, dim=-1)
        q, k, v = (t.reshape(rows, width, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(out.transpose(1, 2).reshape(rows, width, d_model), self.out_weight[0], self.out_bias)


class DenseFeedForward(nn.Module):
    """fc2(relu(fc1(x))); weights [1, F, D], the second stored transposed."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.randn(1, d_ff, d_model) * d_model**-0.5)
        self.fc1_bias = nn.Parameter(torch.zeros(d_ff))
        self.fc2_weight = nn.Parameter(torch.randn(1, d_ff, d_model) * d_ff**-0.5)
        self.fc2_bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, W, D] -> output, zero balance loss, no expert load."""
        hidden = F.relu(F.linear(x, self.fc1_weight[0], self.fc1_bias))
        return F.linear(hidden, self.fc2_weight[0].T, self.fc2_bias), x.new_zeros((), dtype=torch.float32), x.new_zeros(0)


class SparseFeedForward(nn.Module):
    """Top-2 mixture of experts with NLLB's renormalised gates and its factor on every expert output."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, output_scale: float) -> None:
        super().__init__()
        self.output_scale, self.num_experts = output_scale, num_experts
        self.router = nn.Parameter(torch.randn(num_experts, d_model) * d_model**-0.5)
        self.fc1_weight = nn.Parameter(torch.randn(num_experts, d_ff, d_model) * d_model**-0.5)
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, d_ff))
        self.fc2_weight = nn.Parameter(torch.randn(num_experts, d_ff, d_model) * d_ff**-0.5)
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, d_model))

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, W, D], valid bool[B, W] -> output [B, W, D], balance loss (scalar), top-1 load float32[E].

        Balance loss: E * sum_e load_e * mean router probability_e over valid tokens (Switch Transformer, eq. 4).
        """
        probs = torch.softmax(F.linear(x.float(), self.router.float()), dim=-1)
        top = probs.topk(2, dim=-1).indices
        chosen = torch.zeros_like(probs).scatter(-1, top, 1.0)
        gates = probs * chosen
        gates = self.output_scale * gates / gates.sum(-1, keepdim=True)
        weight = valid[..., None].float()
        num_valid = weight.sum().clamp(min=1.0)
        load = (F.one_hot(top[..., 0], self.num_experts) * weight).sum((0, 1)) / num_valid
        balance = self.num_experts * (load * (probs * weight).sum((0, 1)) / num_valid).sum()
        gates = gates.to(x.dtype)
        experts, d_ff, d_model = self.fc1_weight.shape
        hidden = F.relu(F.linear(x, self.fc1_weight.reshape(experts * d_ff, d_model), self.fc1_bias.reshape(-1)))
        hidden = (hidden.view(*hidden.shape[:-1], experts, d_ff) * gates[..., None]).flatten(-2)
        out = F.linear(hidden, self.fc2_weight.reshape(experts * d_ff, d_model).T) + gates @ self.fc2_bias
        return out, balance, load.detach()


class Layer(nn.Module):
    """One pre-norm layer of either stack; `cross` adds cross attention."""

    def __init__(self, config: ModelConfig, *, cross: bool, sparse: bool, dropout: float) -> None:
        super().__init__()
        d_model, d_ff = config.d_model, config.decoder_ffn_dim if cross else config.encoder_ffn_dim
        heads = config.decoder_attention_heads if cross else config.encoder_attention_heads
        self.dropout = dropout
        self.self_attn_norm = nn.LayerNorm(d_model)
        self.self_attn = Attention(d_model, heads, cross=False)
        self.cross_attn_norm = nn.LayerNorm(d_model) if cross else None
        self.cross_attn = Attention(d_model, heads, cross=True) if cross else None
        self.ff_norm = nn.LayerNorm(d_model)
        self.ff = (
            SparseFeedForward(d_model, d_ff, config.num_experts, config.expert_output_scale)
            if sparse
            else DenseFeedForward(d_model, d_ff)
        )

    def forward(
        self, x: Tensor, memory: Tensor | None, mask: Tensor, cross_mask: Tensor | None, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, W, D] -> x, balance loss, expert load."""
        p = self.dropout if self.training else 0.0
        x = x + F.dropout(self.self_attn(self.self_attn_norm(x), None, mask), p)
        if self.cross_attn is not None and self.cross_attn_norm is not None and cross_mask is not None:
            x = x + F.dropout(self.cross_attn(self.cross_attn_norm(x), memory, cross_mask), p)
        out, balance, load = self.ff(self.ff_norm(x), valid)
        return x + F.dropout(out, p), balance, load


def label_smoothed_loss(
    hidden: Tensor, embedding: Tensor, labels: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], embedding [V, D], labels int64[N] -> (smoothed loss, plain negative log-likelihood, accuracy), means
    over labels that are not IGNORED_LABEL.
    """
    logits = F.linear(hidden, embedding).float()
    valid = (labels != IGNORED_LABEL).float()
    target = labels.clamp(min=0)
    log_z = torch.logsumexp(logits, dim=-1)
    at_label = logits.gather(-1, target[:, None])[:, 0]
    num = valid.sum().clamp(min=1.0)
    nll = ((log_z - at_label) * valid).sum() / num
    uniform = ((log_z - logits.mean(-1)) * valid).sum() / num
    accuracy = ((at_label >= logits.max(-1).values).float() * valid).sum() / num
    return (1.0 - smoothing) * nll + smoothing * uniform, nll.detach(), accuracy.detach()


class TrainingNetwork(nn.Module):
    """Encoder-decoder with tied embeddings. Call `forward(batch)` for losses; `compile_regions()` for the GPU."""

    positions: Tensor

    def __init__(self, config: ModelConfig, *, dropout: float, label_smoothing: float, balance_weight: float) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        self.label_smoothing, self.balance_weight = label_smoothing, balance_weight
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5)
        self.encoder = nn.ModuleList(
            Layer(config, cross=False, sparse=config.is_sparse("encoder", i), dropout=dropout)
            for i in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            Layer(config, cross=True, sparse=config.is_sparse("decoder", i), dropout=dropout)
            for i in range(config.decoder_layers)
        )
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.register_buffer("positions", sinusoidal_positions(512, config.d_model, config.pad_token_id), persistent=False)
        self._run_layer: _LayerFunction = _run_layer
        self._loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = label_smoothed_loss

    def compile_regions(self) -> None:
        """Compile one layer of each kind and the loss (not the unrolled model: compile time is lease time)."""
        self._run_layer = torch.compile(_run_layer, dynamic=False)
        self._loss = torch.compile(label_smoothed_loss, dynamic=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and counts: `loss` (to minimise), `nll`, `accuracy`, `balance`, `load` float32[sparse layers, E]."""
        compiled = self.training
        run: _LayerFunction = self._run_layer if compiled else _run_layer
        loss_of = self._loss if compiled else label_smoothed_loss
        dtype = self.embedding.dtype
        masks = [additive(m, dtype) for m in (batch.source_mask, batch.target_mask, batch.cross_mask)]
        balances, loads = [], []
        x = self._embed(batch.source_ids, batch.positions)
        for layer in self.encoder:
            x, balance, load = run(layer, x, None, masks[0], None, batch.source_valid)
            balances.append(balance)
            loads.append(load)
        memory = self.encoder_norm(x)
        target_valid = batch.labels != IGNORED_LABEL
        x = self._embed(batch.target_ids, batch.positions)
        for layer in self.decoder:
            x, balance, load = run(layer, x, memory, masks[1], masks[2], target_valid)
            balances.append(balance)
            loads.append(load)
        hidden = self.decoder_norm(x)
        loss, nll, accuracy = loss_of(
            hidden.flatten(0, 1), self.embedding, batch.labels.flatten(), self.label_smoothing if compiled else 0.0
        )
        balance = torch.stack(balances).sum()
        sparse_loads = [load for load in loads if load.numel()]
        return {
            "loss": loss + self.balance_weight * balance,
            "nll": nll,
            "accuracy": accuracy,
            "balance": balance.detach(),
            "load": torch.stack(sparse_loads) if sparse_loads else loss.new_zeros(0, 0),
        }

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        scale = self.config.d_model**0.5 if self.config.scale_embedding else 1.0
        # the k-th token (from 0) of a sentence uses position row k + pad + 1; padding is masked everywhere
        x = F.embedding(ids, self.embedding) * scale + self.positions[positions + self.config.pad_token_id + 1].to(
            self.embedding.dtype
        )
        return F.dropout(x, self.dropout if self.training else 0.0)


def _run_layer(
    layer: Layer, x: Tensor, memory: Tensor | None, mask: Tensor, cross_mask: Tensor | None, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = layer(x, memory, mask, cross_mask, valid)
    return out


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True/False mask -> 0/-inf of `dtype`."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
