"""Plain torch truth of `encoder_attention`, token by token in fp64."""

from __future__ import annotations

import torch


def encoder_attention_reference(
    qkv: torch.Tensor, token_starts: torch.Tensor, token_ends: torch.Tensor, *, num_heads: int
) -> torch.Tensor:
    """Same contract as `encoder_attention`; copies its indices to the host."""
    num_tokens, width = qkv.shape
    query, key, value = qkv.double().view(num_tokens, 3, num_heads, -1).unbind(1)
    out = torch.zeros(num_tokens, width // 3, dtype=qkv.dtype, device=qkv.device)
    for token, (start, end) in enumerate(zip(token_starts.tolist(), token_ends.tolist(), strict=True)):
        if start == end:
            continue
        scores = torch.einsum("hd,shd->hs", query[token], key[start:end]) / query.shape[-1] ** 0.5
        out[token] = torch.einsum("hs,shd->hd", torch.softmax(scores, dim=-1), value[start:end]).flatten().to(qkv.dtype)
    return out
