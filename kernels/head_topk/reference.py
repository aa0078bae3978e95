"""Plain torch truth of `head_topk`. R rows, D features, V vocabulary, k tokens a row."""

from __future__ import annotations

import torch

from kernels.head_topk.operands import TopTokens
from kernels.int8_linear import Int8Linear
from kernels.quantized_rows import QuantizedRows


def head_topk_reference(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | Int8Linear,
    *,
    k: int,
    vocab_size: int,
    banned: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> TopTokens:
    """Same contract as `head_topk`, computed in `dtype`; values and log_sum_exp are returned in it."""
    matrix = weight.dequantized(dtype) if isinstance(weight, Int8Linear) else weight.to(dtype)
    rows = x.dequantize(dtype) if isinstance(x, QuantizedRows) else x.to(dtype)
    logits = rows @ matrix[:vocab_size].T
    log_sum_exp = torch.logsumexp(logits, 1)
    if banned is not None:
        ids = torch.arange(vocab_size, device=x.device)
        logits = torch.where(ids == banned[:, None], float("-inf"), logits)
    # a stable sort keeps the lowest id first among equals, which topk does not promise
    order = torch.sort(logits, dim=1, descending=True, stable=True)
    values, token_ids = order.values[:, :k] - log_sum_exp[:, None], order.indices[:, :k].int()
    broken = ~log_sum_exp.isfinite()
    values[broken], token_ids[broken], log_sum_exp[broken] = float("nan"), 0, float("nan")
    return TopTokens(values, token_ids, log_sum_exp)
